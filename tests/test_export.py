"""An export computes what the checkpoint's network computes, says how to use it, and predict.py runs it."""

import functools
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import utils.exported
from benchmarks.measure import past_warm_up
from datasets import DATASETS
from networks import DMWLA, DSGIM, NETWORKS, VARIANTS, build, register
from tests.test_predict import write_scan
from utils import predictor as predictors
from utils.checkpoint import save_checkpoint
from utils.exported import ENDINGS, Agreement, SummedLogits, compare, describe, open_export, trace, write_export

SIZE = 64


class Blocks(torch.nn.Module):
    """The paper's blocks, narrow and wide, in a tenth of Sim-MPNet's operations, which takes a tenth of the time."""

    def __init__(self, num_classes: int = 4, in_channels: int = 1, img_size: int = SIZE, variant: str = "paper"):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.stem = torch.nn.Conv2d(in_channels, 16, 8, 8)
        self.narrow, self.wide = DMWLA(16, 32, 3, 20, variant=variant), DMWLA(16, 8, 3, 20, variant=variant)
        self.dsgim = DSGIM(16, variant=variant)
        self.head = torch.nn.Conv2d(16, num_classes, 1)

    def memory_banks(self):
        return iter((self.narrow.bank, self.wide.bank))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.wide(self.narrow(self.stem(x)))
        x = self.head(x + self.dsgim(x))
        return [torch.nn.functional.interpolate(x, scale_factor=8, mode="bilinear")] * 4


def seasoned(model: torch.nn.Module, in_use: bool = True) -> torch.nn.Module:
    """Give a network the running statistics, and a memory if it is to be in use, of a few steps."""
    if in_use:
        past_warm_up(model)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, model.config["in_channels"], SIZE, SIZE))
    return model.eval()


def blocks(in_use: bool = True, **config) -> Blocks:
    torch.manual_seed(0)
    model = seasoned(build("blocks", **config), in_use)
    with torch.no_grad():  # so that it finds more than one class
        logits = model(torch.rand(4, model.config["in_channels"], SIZE, SIZE))[0]
        model.head.bias -= logits.mean((0, 2, 3))
    return model


def whole(in_use: bool = True, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    small = dict(model_scale="pico", feature_dim=16, decoder_feature_dim=16, columns_per_cluster=20)
    return seasoned(build(img_size=SIZE, img_size_dmwla=SIZE, **small, **config), in_use)


def save(path: Path, model: torch.nn.Module, dataset: str) -> Path:
    info = DATASETS[dataset]
    data = {"dataset": dataset, "class_names": info.class_names, "preprocessing": info.preprocessing.to_dict()}
    state = {"model": model.state_dict(), "network": model.config, "data": data, "epoch": 7, "git": "abc"}
    save_checkpoint(path, state)
    return path


def need(kind: str) -> None:
    """Skip a test of a format whose packages are not here."""
    for package in ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ():
        pytest.importorskip(package, reason="requirements-export.txt is not installed")


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """What most checkpoints of these tests are rebuilt as."""
    register("blocks", size_step=16)(Blocks)
    yield
    del NETWORKS["blocks"]


def run_export(checkpoint: Path, kind: str, path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        command = f"export.py --checkpoint {checkpoint} --format {kind} --output {path}"
        patch.setattr(sys, "argv", command.split())
        export.main()


@pytest.fixture(scope="module")
def model() -> Blocks:
    return blocks()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("run") / "best.pth", model, "acdc")


@pytest.fixture(scope="module", params=ENDINGS)
def exported(request, checkpoint, tmp_path_factory) -> Path:
    """What export.py wrote."""
    need(request.param)
    path = tmp_path_factory.mktemp(request.param) / f"model{ENDINGS[request.param]}"
    run_export(checkpoint, request.param, path)
    return path


@functools.cache
def open_without_this_repository(path: Path):
    """Return the metadata of an export and the function that it computes, as docs/export.md tells other programs to."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        text = session.get_modelmeta().custom_metadata_map["sim_mpnet"]
        return json.loads(text), lambda image: session.run(["logits"], {"image": image})[0]
    files = {"sim_mpnet.json": ""}
    module = torch.export.load(path, extra_files=files).module()
    return json.loads(files["sim_mpnet.json"]), lambda image: module(torch.from_numpy(image)).numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_any_batch_gives_the_summed_logits_of_the_network(exported, model, batch_size):
    image = torch.rand(batch_size, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = sum(model(image)).numpy()
    found = open_without_this_repository(exported)[1](image.numpy())
    assert found.shape == (batch_size, 4, SIZE, SIZE) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


def test_the_file_says_what_goes_in_and_what_comes_out(exported, checkpoint):
    metadata, _ = open_without_this_repository(exported)
    assert metadata["dataset"] == "acdc"
    assert metadata["class_names"] == list(DATASETS["acdc"].class_names)
    assert metadata["label_order"] == ["background", *DATASETS["acdc"].class_names]
    assert metadata["preprocessing"] == DATASETS["acdc"].preprocessing.to_dict()
    assert f"{SIZE} x {SIZE}" in metadata["preprocessing_steps"]
    assert metadata["input"]["shape"] == ["B", 1, SIZE, SIZE]
    assert metadata["output"]["shape"] == ["B", 4, SIZE, SIZE]
    assert metadata["network"]["variant"] == "paper" and metadata["memory"] == "frozen"
    assert metadata["checkpoint"]["sha256"] == export.sha256(checkpoint)
    assert (metadata["checkpoint"]["epoch"], metadata["checkpoint"]["git"]) == (7, "abc")


def test_predict_segments_with_an_export_as_with_its_checkpoint(exported, checkpoint, tmp_path, run_script):
    nibabel = pytest.importorskip("nibabel")
    scan = write_scan(tmp_path, "scan", "RAS")
    segmentations = []
    for source in (checkpoint, exported):
        out = tmp_path / f"{source.suffix[1:]}.nii.gz"
        done = run_script("predict.py", *f"--checkpoint {source} --input {scan} --output {out} --device cpu".split())
        assert done.status == 0, done.error
        segmentations.append(np.asarray(nibabel.load(out).dataobj))
    assert len(np.unique(segmentations[0])) > 1
    assert (segmentations[0] == segmentations[1]).mean() > 0.999


def test_a_colour_network_in_warm_up_is_exported_too(tmp_path):
    model = blocks(in_use=False, num_classes=2, in_channels=3)
    path = save(tmp_path / "best.pth", model, "isic")
    run_export(path, "torch", tmp_path / "model.pt2")
    predictor = predictors.Predictor(tmp_path / "model.pt2", "cpu")
    assert predictor.planar and predictor.class_names == DATASETS["isic"].class_names
    assert "warm-up" in predictor.model.metadata["memory"]
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    Image.fromarray(noise).resize((100, 80), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    expected = predictors.Predictor(path, "cpu")(tmp_path / "photo.png")
    assert 0 < expected.mean() < 1
    assert (predictor(tmp_path / "photo.png") == expected).mean() > 0.999


@pytest.mark.parametrize(
    "options",
    [
        dict(network="unet"),
        dict(attention="plain", dsgim="none", encoders="dmwla", loss="last", model_scale="pico", img_size_dmwla=SIZE),
    ],
    ids=["baseline", "ablation"],
)
def test_baselines_and_ablations_are_exported_too(tmp_path, monkeypatch, options):
    """Of each the one that is traced fastest."""
    monkeypatch.setattr("networks.dmwla_encoder.DEPTHS", (1, 1, 1, 1))
    pytest.importorskip("nibabel")
    if "network" in options:
        pytest.importorskip("segmentation_models_pytorch", reason="requirements-baselines.txt is not installed")
    torch.manual_seed(0)
    model = seasoned(build(num_classes=4, img_size=SIZE, **options))
    checkpoint, scan = save(tmp_path / "best.pth", model, "acdc"), write_scan(tmp_path, "scan", "RAS")
    expected = predictors.Predictor(checkpoint, "cpu")(scan).get_fdata()
    assert len(np.unique(expected)) > 1
    for kind, ending in ENDINGS.items():
        need(kind)
        run_export(checkpoint, kind, tmp_path / f"model{ending}")
        predictor = predictors.Predictor(tmp_path / f"model{ending}", "cpu")
        assert (predictor(scan).get_fdata() == expected).mean() > 0.999
        assert predictor.model.metadata["network"] == model.config
        assert predictor.model.metadata["memory"] == "none"


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_leaves_its_memory_as_it_is(variant):
    model = blocks(variant=variant)
    image = torch.rand(3, 1, SIZE, SIZE)
    pools = [bank.pool.clone() for bank in model.memory_banks()]
    program = trace(SummedLogits(model))
    run = program.module()
    with torch.inference_mode():
        first, second = run(image), run(image)
        expected = sum(model(image))
    assert not program.graph_signature.buffers_to_mutate
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-4)
    assert all(torch.equal(bank.pool, pool) for bank, pool in zip(model.memory_banks(), pools, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("in_use", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ENDINGS)
def test_every_kind_of_network_computes_what_pytorch_computes(tmp_path, kind, variant, in_use):
    need(kind)
    model = whole(in_use, num_classes=2, in_channels=3, variant=variant)
    network, path = SummedLogits(model), tmp_path / f"model{ENDINGS[kind]}"
    write_export(path, trace(network), describe(model, "acdc", (), {}, "", {}))
    exported = open_export(path, "cpu")
    for batch_size in (1, 3):
        found = compare(network, exported, batch_size)
        assert found.good and found.difference < 1e-4 and found.other_class < 1e-3


def test_what_is_doubtful_about_a_checkpoint_is_said(tmp_path, run_script, monkeypatch):
    path = save(tmp_path / "best.pth", blocks(in_use=False, variant="release"), "acdc")
    monkeypatch.setattr(utils.exported, "describe", lambda *_: sys.exit(3))  # all that is warned of has been by then
    done = run_script("export.py", *f"--checkpoint {path} --format torch --output {tmp_path}/model.pt2".split())
    assert done.status == 3
    warnings = [line for line in done.error.splitlines() if line.startswith("warning")]
    assert len(warnings) == 2 and "warm-up" in warnings[0] and "release" in warnings[1]


def test_an_export_that_differs_from_pytorch_is_not_written(checkpoint, tmp_path, run_script, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, image):
            return image.expand(-1, 4, -1, -1) + torch.nan

    batch = {"image": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Broken(), (torch.zeros(2, 1, SIZE, SIZE),), dynamic_shapes=batch)
    monkeypatch.setattr(utils.exported, "trace", lambda _: program)
    done = run_script("export.py", *f"--checkpoint {checkpoint} --format torch --output {tmp_path}/model.pt2".split())
    assert done.status == 1 and "was not written" in done.error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_judged_by_the_largest_logit():
    assert Agreement(difference=9e-4, scale=10, other_class=0).good
    assert not Agreement(difference=2e-4, scale=1, other_class=0).good


def one_line(done, *words: str, after: tuple[str, ...] = ()) -> None:
    """Hold an error to one line with these words, and what precedes it to lines with the words of ``after``."""
    assert done.status == 1
    *progress, error = done.error.strip().splitlines()
    assert len(progress) == len(after) and all(map(str.__contains__, progress, after)), done.error
    assert error.startswith("error: ") and all(word in error for word in words), done.error


def test_what_cannot_be_exported_is_said_in_one_line(checkpoint, tmp_path, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for flags, words in (
        (f"--checkpoint {checkpoint} --format onnx --output {tmp_path}/m.onnx", ("onnxscript", "pip install -r")),
        (f"--checkpoint {checkpoint} --format onnx --output {tmp_path}/m.pt2", ("m.pt2", ".onnx")),
        (f"--checkpoint m.onnx --format torch --output {tmp_path}/m.pt2", ("m.onnx", "best.pth")),
        (f"--checkpoint {tmp_path}/no.pth --format torch --output {tmp_path}/m.pt2", ("no checkpoint at",)),
    ):
        if "onnxscript" in words:
            pytest.importorskip("onnx")
        one_line(run_script("export.py", *flags.split()), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced_is_said_in_one_line(tmp_path, run_script):
    class Untraceable(torch.nn.Module):
        def forward(self, image):
            return image.expand(-1, 4, -1, -1) * (1 if image.sum() > 0 else 2)

    register("untraceable")(lambda num_classes, in_channels, img_size: Untraceable())
    try:
        path = save(tmp_path / "best.pth", build("untraceable", num_classes=4, in_channels=1, img_size=SIZE), "acdc")
        flags = f"--checkpoint {path} --format torch --output {tmp_path}/model.pt2"
        done = run_script("export.py", *flags.split())
        one_line(done, "cannot trace network untraceable", "control flow", after=("tracing",))
    finally:
        del NETWORKS["untraceable"]
    assert list(tmp_path.iterdir()) == [path]


def archive(files: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return content.getvalue()


def other_onnx() -> bytes:
    from onnx import TensorProto, helper

    shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", shape[:1], shape[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.onnx", None, ("no export at",)),
        ("none.pt2", None, ("no export at",)),
        ("damaged.onnx", b"\x08\x0a\x12", ("no ONNX file",)),
        ("other.onnx", other_onnx, ("metadata", "export.py")),
        ("damaged.pt2", b"PK\x03\x04", ("no export, or one cut off",)),
        ("other.pt2", archive({"archive/version": "0"}), ("metadata", "export.py")),
        ("little.pt2", archive({"archive/extra/sim_mpnet.json": '{"img_size": 64}'}), ("num_classes",)),
    ],
)
def test_a_file_that_is_no_export_is_one_line(tmp_path, run_script, name, content, words):
    need("onnx" if name.endswith("onnx") else "torch")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content() if callable(content) else content)
    flags = f"--checkpoint {path} --input scan.nii.gz --output {tmp_path}/out.nii.gz --device cpu"
    one_line(run_script("predict.py", *flags.split()), str(path), *words)


def test_a_program_of_another_pytorch_is_one_line(tmp_path, run_script):
    metadata = dict.fromkeys(utils.exported.METADATA, 4) | {"checkpoint": {"versions": {"torch": "9.9"}}}
    (tmp_path / "m.pt2").write_bytes(archive({"archive/extra/sim_mpnet.json": json.dumps(metadata)}))
    flags = f"--checkpoint {tmp_path}/m.pt2 --input scan.nii.gz --output {tmp_path}/out.nii.gz --device cpu"
    one_line(run_script("predict.py", *flags.split()), "9.9", "export.py")


def test_what_an_export_cannot_do_is_one_line(exported, run_script, tmp_path):
    flags = f"--checkpoint {exported} --input scan.nii.gz --output {tmp_path}/out.nii.gz"
    one_line(run_script("predict.py", *flags.split(), "--amp", "bf16"), "--amp bf16", "float32")
    if not torch.cuda.is_available():
        one_line(run_script("predict.py", *flags.split(), "--device", "cuda"), "--device cpu")


def test_without_onnxruntime_an_onnx_file_is_one_line(tmp_path, run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    flags = f"--checkpoint {tmp_path}/model.onnx --input scan.nii.gz --output {tmp_path}/out.nii.gz"
    one_line(run_script("predict.py", *flags.split()), "onnxruntime", "pip install -r requirements-export.txt")


@pytest.mark.gpu
def test_an_export_computes_the_same_on_the_gpu(exported, model):
    if exported.suffix == ".onnx":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime here has no CUDA provider: onnxruntime-gpu is another package")
    assert compare(SummedLogits(model), open_export(exported, "cuda"), 2).good
