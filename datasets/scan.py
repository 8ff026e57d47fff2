"""Read scans as scanners, hospitals and other programs store them, and write segmentations on their grid."""

import gzip
import logging
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.dicom import TO_RAS, choose, itk, load_dicom
from datasets.errors import DataError, brief, counted
from datasets.lists import PREPARED_ENDINGS, is_slice
from datasets.preprocessing import Preprocessing, is_affine, is_rigid, orientation_of, reorient, upright
from datasets.scan_files import DICOM_ENDINGS, IMG_ENDINGS, ITK_ENDINGS, case_name, channel_files, itk_header
from datasets.storage import MAX_INFLATION, MAX_VALUE, check_declared, checked_label, reading
from datasets.volumes import Volume, read_volume

logger = logging.getLogger(__name__)

_FORMS = "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z pixdim"
# Of units by their names, and by NIfTI's codes of the metre and the micrometre; a missing unit means mm.
_MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, 1: 1000.0, 3: 0.001}


class Stored(NamedTuple):
    """The content of a scan's files.

    channels: intensities, (z, y, x) each; affine: float64 (4, 4), or None if the file gives no voxel size; type: number
    type in the file; header: a NIfTI header or None; both its form codes are 0 if the file gives no orientation; unit:
    of the lengths in the file. The affine is in mm.
    """

    channels: Sequence[np.ndarray]
    affine: np.ndarray | None
    type: str
    header: Any = None
    unit: str = "mm"


@dataclass
class Scan(Volume):
    """A Volume that was read from a scan.

    header: the NIfTI header whose qform, sform and units a segmentation repeats, or None. If the file gives no voxel
    size, ``spacing`` is None, and ``affine`` guesses the directions of the axes, with voxels as the unit.
    """

    header: Any = None
    unit: str = "mm"

    def to_nifti(self, array: np.ndarray):
        """Return a nibabel image of an array (D, H, W), with the axes, qform and sform of the scan's file."""
        import nibabel

        image = super().to_nifti(array)
        if self.header is None:
            return image
        keys = [*_FORMS.split(), "xyzt_units"]
        if not is_rigid(self.affine) and not self.header["qform_code"]:  # keep the upright qform for ITK's programs
            keys = [key for key in keys if key[0] not in "qp"]
        for key in keys:
            image.header[key] = self.header[key]
        return nibabel.Nifti1Image(image.dataobj, image.header.get_best_affine(), image.header)


def read_scan(path: str | Path | Sequence[Path], preprocessing: Preprocessing, time_point: int | None = None) -> Volume:
    """Read a scan of any format of ``SCAN_ENDINGS`` or a DICOM series, as a Volume without a label.

    path: for several channels, all files, one of them (see ``channel_files``), or one file that holds all channels;
    time_point: index from 0 of the volume to read, if the scan has several. Intensities are scaled to [0, 1]; those of
    a prepared volume are not changed. ``affine`` describes the axes after preprocessing, ``orientation`` the axes of
    the file, and ``stored_type`` is its number type. Raises DataError as ``load_scan`` does, and for scans and prepared
    volumes that do not fit the preprocessing.
    """
    from nibabel import Nifti1Header

    files = channel_files(path, preprocessing.channels) if isinstance(path, str | Path) else list(path)
    path = files[0]
    if path.name.lower().endswith(PREPARED_ENDINGS):
        choose(path, 1, time_point, "volume")
        return _read_prepared(path, preprocessing)
    if preprocessing.stored is not None:
        raise DataError(
            f"{path}: the network was trained on prepared files with intensities from {preprocessing.stored[0]:g} to "
            f"{preprocessing.stored[1]:g}, and their preparation is unknown; train on files with intensities in [0, 1]"
        )
    channels, affine, stored_type, header, unit = load_scan(files, preprocessing.channels, time_point)
    measured = affine is not None
    header = header if measured else Nifti1Header()
    if header is not None and not (header["qform_code"] or header["sform_code"]):
        logger.warning(
            "%s: its header does not give the orientation in the patient%s; left and right may be exchanged",
            path, "" if measured else " or the voxel size, so no volume in millilitres is written",
        )  # fmt: skip
    affine = affine if measured else TO_RAS
    if not is_rigid(affine):
        logger.warning(
            "%s: its axes are not at right angles (tilted gantry); a NIfTI segmentation stores them in its sform, and "
            "axes without the tilt in its qform, for programs that need right angles (ITK, 3D Slicer, ITK-SNAP)", path,
        )  # fmt: skip
    if preprocessing.window is not None:
        low, high, (bottom, top) = channels[0].min(), channels[0].max(), preprocessing.window
        if bottom < 0 <= low or min(high, top) - max(low, bottom) < 0.25 * (top - bottom):
            unit = "Hounsfield units (air: -1000)" if bottom < 0 else "intensities in a fixed unit"
            logger.warning(
                "%s: its values run from %g to %g, but the network expects %s and uses the window %g to %g; convert "
                "the scan, otherwise the segmentation is not reliable", path, low, high, unit, bottom, top,
            )  # fmt: skip
    orientation = orientation_of(affine)
    turned = [reorient(one, affine, preprocessing.orientation or orientation) for one in channels]
    image, affine = preprocessing.scaled([voxels for voxels, _ in turned]), turned[0][1]
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist()) if measured else None
    return Scan(case_name(files), image, None, spacing, affine, (), orientation, stored_type, header, unit)


def load_scan(files: Sequence[Path], count: int = 1, time_point: int | None = None) -> Stored:
    """Read the ``count`` channels of a scan as stored, from one file per channel or from one file with all channels.

    Raises DataError for a file that is missing, damaged or too large, that is not one scan with three axes, or that
    holds NaN or infinite values, and for channels that are not on one grid.
    """
    if len(files) not in (1, count):
        raise DataError(f"{files[0]}: has {counted(len(files), 'channel')}; expected {count}, or one file with all")
    scans = [_load(file, time_point, count if len(files) == 1 else 1) for file in files]
    grids = [np.zeros((4, 4)) if scan.affine is None else scan.affine for scan in scans]
    shapes = [scan.channels[0].shape[::-1] for scan in scans]
    side = np.linalg.norm(grids[0][:3, :3], axis=0).min()  # of a voxel; grids may be in micrometres
    for file, grid, shape in zip(files, grids, shapes, strict=True):
        if shape != shapes[0] or not np.allclose(grid, grids[0], rtol=1e-3, atol=1e-2 * side):
            raise DataError(
                f"{file}: differs in shape, spacing or position from {files[0].name} ({shape} and {shapes[0]} voxels); "
                "expected the channels of a case on one grid: resample one of them"
            )
    return scans[0]._replace(channels=[channel for scan in scans for channel in scan.channels])


def read_scan_label(path: str | Path, volume: Volume, num_classes: int | None = None) -> np.ndarray:
    """Read the label of a scan and reorient it like the image: uint8 (D, H, W), ids below ``num_classes``.

    Without ``num_classes``, values up to ``MAX_VALUE`` are accepted, because the caller maps them to class indices; the
    result is uint16 if a value is above 255. Sets ``volume.stored_type`` to the number type of the label's file. Raises
    DataError for a damaged file, and for a shape, axes or spacing that do not fit the image.
    """
    (voxels,), affine, volume.stored_type, *_ = load_scan([Path(path)])
    affine = TO_RAS if affine is None else affine
    found, wanted = orientation_of(affine), volume.orientation or orientation_of(volume.affine)  # as stored
    between = np.linalg.inv(volume.affine) @ affine  # from the label's voxels to the image's
    voxels, between = reorient(voxels, between, "RAS")  # the image's axes take the place of R, A and S
    label = checked_label(path, voxels, volume.image.shape[:3], num_classes, 255 if num_classes else MAX_VALUE)
    apart = not np.allclose(between[:3, 3], 0, atol=0.1)
    if not np.allclose(between[:3, :3], np.eye(3), atol=0.1) or (apart and found != wanted):
        raise DataError(
            f"{path}: its axes ({found}), spacing or position do not fit its image ({wanted}); "
            "resample the label, or copy the affine of the image file to it if their voxels match by index"
        )
    if apart:
        distance = np.linalg.norm(volume.affine[:3, :3] @ between[:3, 3])
        logger.warning("%s: its position is %.3g mm from its image's; voxels are matched by index", path, distance)
    return label


def write_segmentation(path: Path, volume: Volume, prediction: np.ndarray) -> None:
    """Write class indices, uint8 (D, H, W), on the volume's grid; ``path`` ends in one of ``LABEL_ENDINGS``."""
    import nibabel

    ending = path.suffix.lower()
    if ending in (".nii", ".gz"):
        nibabel.save(volume.to_nifti(prediction), path)
        return
    image = Volume.to_nifti(volume, prediction)
    if ending == ".mgz":
        nibabel.save(nibabel.MGHImage(np.asarray(image.dataobj, np.uint8), image.affine), path)
        return
    import SimpleITK

    unit = volume.unit if isinstance(volume, Scan) else "mm"  # the scan's own, because ITK's programs ignore it
    affine = np.diag([1 / _MILLIMETRES[unit]] * 3 + [1]) @ TO_RAS @ image.affine
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    written = SimpleITK.GetImageFromArray(np.asarray(image.dataobj).T)
    written.SetSpacing(sides.tolist())
    written.SetDirection((affine[:3, :3] / sides).ravel().tolist())
    written.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(written, str(path), True)
    if unit != "mm":  # ITK does not write it
        nrrd = b"space origin:", f'space units: "{unit}" "{unit}" "{unit}"\n'
        before, line = nrrd if ending == ".nrrd" else (b"ElementSpacing =", f"DistanceUnits = {unit}\n")
        path.write_bytes(path.read_bytes().replace(before, line.encode() + before, 1))


def _read_prepared(path: Path, preprocessing: Preprocessing) -> Volume:
    """Read the image of a prepared volume or slice, without its label, and check that it fits the network."""
    volume = read_volume(path, labelled=False, ndim=2 if is_slice(path) else 3)
    if is_slice(path):
        volume.image = volume.image[None]
    low, high, (bottom, top) = volume.image.min(), volume.image.max(), preprocessing.stored or (0.0, 1.0)
    slack = (top - bottom) / 10
    is_dark = high < bottom + slack and not (is_slice(path) and preprocessing.stored is None)  # a slice may be dark
    if low < bottom - slack or high > top + slack or is_dark:
        raise DataError(
            f"{path}: its intensities run from {low:g} to {high:g}, but the network was trained on {bottom:g} to "
            f"{top:g}; prepare it like the training data"
        )
    channels = (preprocessing.channels,) if preprocessing.channels > 1 else ()
    if volume.image.shape[3:] != channels:
        expected = ", ".join(map(str, ("slices", "rows", "columns", *channels)))
        raise DataError(f"{path}: its shape is {volume.image.shape}; expected ({expected}) as in training")
    found = None if volume.affine is None else orientation_of(volume.affine)
    if found and preprocessing.orientation not in (None, found):
        raise DataError(f"{path}: its axes run {found}, not {preprocessing.orientation}; prepare it as in training")
    return volume


def _load(path: Path, time_point: int | None, count: int) -> Stored:
    """Read all ``count`` volumes of a file as channels, or only one volume, and check values and geometry."""
    name = path.name.lower()
    with reading(path, "scan", "copy, unpack or export it again"):
        if path.is_dir() or name.endswith(("dicomdir", *DICOM_ENDINGS)) or _beginning(path, 132)[128:] == b"DICM":
            voxels, affine = load_dicom(path, time_point)
            stored = Stored([voxels], affine, voxels.dtype.name)
        else:
            stored, rescale = _load_itk(path) if name.endswith(ITK_ENDINGS) else _load_nibabel(path)
            channels = stored.channels
            if count == 1 or time_point is not None:
                channels = [channels[choose(path, len(channels), time_point, "volumes")]]
            if rescale != (1, 0):
                channels = [_rescaled(voxels, *rescale) for voxels in channels]
            stored = stored._replace(channels=channels)
    if len(stored.channels) != count:
        raise DataError(
            f"{path}: is read as {counted(len(stored.channels), 'channel')}; expected {count}: is the file of another "
            "channel missing (_0001, ...)? One file with all channels is read, too (in predict.py without --time_point)"
        )
    if not all(np.isfinite([one.min(), one.max()]).all() for one in stored.channels):
        raise DataError(f"{path}: holds NaN or infinite values; replace them, for example with numpy.nan_to_num")
    if stored.affine is not None and (not is_affine(stored.affine) or "?" in orientation_of(stored.affine)):
        raise DataError(f"{path}: its affine gives no valid directions and spacings of the axes; repair the header")
    _compare_forms(path, stored.header)
    return stored


def _rescaled(voxels: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Return ``slope * voxels + intercept`` as float32, or as float64 for 32-bit integers and 64-bit numbers."""
    intensities = np.empty(voxels.shape, np.result_type(voxels, np.float32))
    for z, plane in enumerate(voxels):  # only one slice at a time is in double precision
        intensities[z] = plane * float(slope) + float(intercept)
    return intensities


def _beginning(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _compare_forms(path: Path, header: Any) -> None:
    """Log a warning if a NIfTI header's qform and sform place the scan differently, by more than float32 rounding."""
    from nibabel.spatialimages import HeaderDataError

    try:
        qform, sform = (None, None) if header is None else (header.get_qform(True)[0], header.get_sform(True)[0])
    except (HeaderDataError, ValueError):  # the header's qform is not a rotation
        return
    if qform is None or sform is None:
        return
    corners = np.array([*np.ndindex(2, 2, 2)]).T * np.reshape(header.get_data_shape()[:3], (3, 1))
    apart = np.linalg.norm((qform - upright(sform)) @ [*corners, np.ones(8)], axis=0).max()
    side = np.linalg.norm(sform[:3, :3], axis=0).min()
    if apart > 0.01 * side:
        logger.warning(
            "%s: its qform and sform put it at two places, up to %.3g voxels apart; the sform is used, and programs "
            "that use the qform show the scan elsewhere", path, apart / side,
        )  # fmt: skip


def _load_itk(path: Path) -> tuple[Stored, tuple[float, float]]:
    """Return the stored numbers of an NRRD or MetaImage file, each volume as a channel, and the slope and intercept."""
    import SimpleITK
    from nibabel import Nifti1Header

    reader = itk_header(path)
    shape = (*reader.GetSize(), reader.GetNumberOfComponents())
    count = math.prod(shape[3:])
    if len(shape) < 4 or 1 not in (shape[-1], count // shape[-1]):
        raise DataError(f"{path}: has shape {brief(shape)}; expected one scan with three axes (a slice: W x H x 1)")
    check_declared(path, "image", shape, np.dtype(np.float32), remedy="convert or crop it")
    with itk():
        image = reader.Execute()
    array = SimpleITK.GetArrayFromImage(image)  # (t, z, y, x) or (z, y, x, t)
    array = np.moveaxis(array, -1, 0) if shape[-1] > 1 else array
    array = array.reshape((count, *shape[2::-1]))
    text = _beginning(path, 2**16).decode("latin-1")
    fields = {key.lower(): value for key, value in re.findall(r"(?m)^([\w ]+?) *(?::(?!=)|=) *(.*?)\r?$", text)}
    if fields.get("compresseddata", "").lower() == "true" and fields.get("elementdatafile") == "LOCAL":
        content = path.read_bytes()
        zlib.decompress(re.split(rb"LOCAL\r?\n", content, maxsplit=1)[1])  # checks the checksum, because ITK does not
    dims = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (dims, dims))[:3, :3] * image.GetSpacing()[:3]
    affine[:3, 3] = image.GetOrigin()[:3]
    sized = {"spacings", "space directions", "elementspacing", "elementsize"} & fields.keys()
    units = fields.get("space units") or fields.get("units") or fields.get("distanceunits") or "mm"
    unit = re.split('["? ]+', units.lower().strip('"? '))[0] or "mm"
    millimetres = _MILLIMETRES.get(unit)
    affine = np.diag([millimetres] * 3 + [1]) @ TO_RAS @ affine if sized and millimetres else None
    header = None
    directed = {"transformmatrix", "orientation", "rotation"} & fields.keys()
    if not directed and not fields.get("space", "").upper().startswith(("L", "R")):
        header = Nifti1Header()
        header["pixdim"][1:4] = np.multiply(image.GetSpacing()[:3], millimetres or 1)
    # ITK does not apply slope and intercept of a MetaImage.
    slope = float(fields.get("elementtointensityfunctionslope", 1))
    intercept = float(fields.get("elementtointensityfunctionoffset", 0))
    return Stored(array, affine, array.dtype.name, header, "mm" if affine is None else unit), (slope, intercept)


def _load_nibabel(path: Path) -> tuple[Stored, tuple[float, float]]:
    """Load NIfTI (one file or two), Analyze or FreeSurfer's MGH as ``_load_itk`` does."""
    import nibabel

    is_mgh_or_pair = path.name.lower().endswith((".mgz", ".mgh", ".hdr", ".hdr.gz", *IMG_ENDINGS))
    image = nibabel.load(path) if is_mgh_or_pair else None
    data, sides = Path(image.file_map["image"].filename) if is_mgh_or_pair else path, (1,)
    # Decide by content, not by name: some browsers unpack a .nii.gz file but keep its name.
    packed = _beginning(data, 2) == b"\x1f\x8b"
    with (gzip.open if packed else open)(data, "rb") as stream:
        if image is None:
            is_second = stream.read(4) in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")  # 540, the length of NIfTI-2's header
            stream.seek(0)
            image = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_stream(stream)
            if not image.header["magic"].item().startswith(b"n+"):
                raise ValueError("its header belongs to a pair of files, .hdr and .img")
            stream.seek(0)
            sides = type(image.header).from_fileobj(stream, check=False)["pixdim"][1:4]  # nibabel turns 0 into 1
        header, proxy, shape, dtype = image.header, image.dataobj, image.shape, image.get_data_dtype()
        check_declared(path, "image", shape, dtype, remedy="convert or crop it")
        if len(shape) < 3 or 0 in shape or sum(length > 1 for length in shape[3:]) > 1:
            raise DataError(f"{path}: has shape {brief(shape)}; expected one scan with three axes (a slice: W x H x 1)")
        end, size = proxy.offset + math.prod(shape) * dtype.itemsize, data.stat().st_size
        if end > size * (MAX_INFLATION if packed else 1):
            raise ValueError(f"has {size} bytes, but its header declares {end}{' unpacked' if packed else ''}")
        voxels = np.asanyarray(proxy.get_unscaled()).reshape((*shape[:3], -1), order="F")
        is_mgh = isinstance(image, nibabel.MGHImage)
        stream.seek(end)
        # gzip checks the checksum at the end of the stream; nibabel stops earlier. MGH has metadata after the voxels.
        if stream.read(2**20) and not is_mgh:
            raise ValueError(f"it continues after the {end} bytes that its header declares")
    voxels = voxels.astype(dtype.newbyteorder("="), copy=False).T  # (t, z, y, x)
    if isinstance(header, nibabel.Nifti1Header):
        metres = np.diag([*[_MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)] * 3, 1])
        affine = metres @ header.get_best_affine() if np.all(sides) or header["sform_code"] else None
    elif is_mgh and header["goodRASFlag"]:
        affine, header = np.array(image.affine, float), None
    else:
        sides, header = header.get_zooms()[:3], nibabel.Nifti1Header()
        header.set_data_shape(shape[:3])
        header.set_zooms(sides)
        affine = header.get_best_affine()
    return Stored(voxels, affine, voxels.dtype.name, header), (proxy.slope, proxy.inter)
