"""An ONNX file computes what the checkpoint's network computes, says how to use it, and predict.py runs it."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from benchmarks.measure import past_warm_up
from datasets import DATASETS
from networks import DMWLA, DSGIM, NETWORKS, VARIANTS, build, register
from tests.comparison_runs import save_network
from tests.test_scripts import assert_one_line
from utils.onnx_network import OnnxNetwork
from utils.predictor import Predictor

onnxruntime = pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

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


class Untraceable(Blocks):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.expand(-1, 4, -1, -1) * (1 if x.sum() > 0 else 2)]


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Networks that checkpoints of these tests are rebuilt as."""
    register("blocks", size_step=16)(Blocks)
    register("untraceable", size_step=16)(Untraceable)
    yield
    del NETWORKS["blocks"], NETWORKS["untraceable"]


def seasoned(network: str, in_use: bool = True, **config) -> torch.nn.Module:
    """Return a network with the statistics of a few training steps, its memory in use or in warm-up."""
    torch.manual_seed(0)
    model = build(network, img_size=SIZE, **config)
    if in_use:
        past_warm_up(model)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, model.config["in_channels"], SIZE, SIZE))
    return model.eval()


def images(model: torch.nn.Module, count: int) -> torch.Tensor:
    return torch.rand(count, model.config["in_channels"], SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare logits; their arg max would magnify rounding where two classes are nearly equal."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return seasoned("blocks", num_classes=4)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    return save_network(tmp_path_factory.mktemp("run") / "best.pth", model, epoch=7, git="abc")


def run_export(checkpoint: Path, output: Path) -> Path:
    """Run export.py in this process, with its functions as a test has patched them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", f"export.py --checkpoint {checkpoint} --format onnx --output {output}".split())
        export.main()
    return output


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    return run_export(checkpoint, tmp_path_factory.mktemp("onnx") / "model.onnx")


@pytest.mark.processors
def test_another_program_gets_the_summed_logits_and_the_facts(exported, checkpoint, model):
    """As docs/export.md tells other programs to."""
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    for batch_size in (1, 2, 5):
        x = images(model, batch_size)
        (found,) = session.run(["logits"], {"image": x.numpy()})
        assert found.dtype == np.float32
        with torch.inference_mode():
            assert_close(torch.from_numpy(found), sum(model(x)))
    facts = json.loads(session.get_modelmeta().custom_metadata_map["sim_mpnet"])
    info = DATASETS["acdc"]
    assert facts["dataset"] == "acdc" and facts["preprocessing"] == info.preprocessing.to_dict()
    assert facts["label_order"] == ["background", *facts["class_names"]] == ["background", *info.class_names]
    assert f"{SIZE} x {SIZE}" in facts["preprocessing_steps"]
    assert facts["input"]["shape"] == ["B", 1, SIZE, SIZE] and facts["output"]["shape"] == ["B", 4, SIZE, SIZE]
    assert facts["network"]["variant"] == "paper" and facts["memory"] == "frozen"
    assert facts["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (facts["checkpoint"]["epoch"], facts["checkpoint"]["git"]) == (7, "abc")


@pytest.mark.processors
def test_a_colour_network_of_the_release_in_warm_up_is_exported_with_warnings(tmp_path, caplog):
    model = seasoned("blocks", in_use=False, num_classes=2, in_channels=3, variant="release")
    predictor = Predictor(run_export(save_network(tmp_path / "best.pth", model, "isic"), tmp_path / "m.onnx"), "cpu")
    assert predictor.planar and predictor.class_names == DATASETS["isic"].class_names
    assert "warm-up" in predictor.model.metadata["memory"]
    warnings = [record.getMessage() for record in caplog.records if record.name == "export"]
    assert "warm-up" in warnings[0] and "variant release" in warnings[1]
    x = images(model, 2)
    with torch.inference_mode():
        assert_close(sum(predictor.model(x)), sum(model(x)))


SMALL = dict(model_scale="pico", img_size_dmwla=SIZE, feature_dim=16, decoder_feature_dim=16, columns_per_cluster=20)


@pytest.mark.slow
@pytest.mark.parametrize("in_use", [True, False])
@pytest.mark.parametrize(
    "options",
    [SMALL | dict(variant=variant) for variant in VARIANTS]
    + [SMALL | dict(attention="plain", dsgim="none", encoders="dmwla", loss="last"), dict(network="unet")]
    + [SMALL | dict(prediction="last")],
)
def test_whole_networks_ablations_and_baselines_are_exported(tmp_path, options, in_use):
    model = seasoned(**{"network": "sim_mpnet", "in_use": in_use, "num_classes": 4} | options)
    run_export(save_network(tmp_path / "best.pth", model), tmp_path / "model.onnx")  # which compares them


def test_a_file_that_differs_from_pytorch_is_not_written(checkpoint, tmp_path, refused, monkeypatch):
    trace, broken = export.trace, seasoned("blocks")
    torch.nn.init.constant_(broken.net.head.bias, torch.nan)
    monkeypatch.setattr(export, "trace", lambda _: trace(export.SummedLogits(broken)))
    refused(lambda: run_export(checkpoint, tmp_path / "model.onnx"), "no file was written")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_in_one_line(checkpoint, tmp_path, run_script, monkeypatch):
    def run(checkpoint, output="m.onnx"):
        return run_script("export.py", *f"--checkpoint {checkpoint} --output {tmp_path}/{output}".split())

    path = save_network(tmp_path / "best.pth", build("untraceable", num_classes=4, in_channels=1, img_size=SIZE))
    assert_one_line(run(checkpoint, "m.pt2"), "m.pt2", ".onnx")
    assert_one_line(run("m.onnx"), "m.onnx", "best.pth")
    assert_one_line(run(tmp_path / "no.pth"), "no checkpoint at")
    assert_one_line(run(path), "cannot trace network untraceable", "branch")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert_one_line(run(checkpoint), "onnxscript", "pip install -r")
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_predicted_with_is_said_in_one_line(exported, tmp_path, run_script, monkeypatch):
    def run(checkpoint, *flags):
        words = f"--checkpoint {checkpoint} --input scan.nii.gz --output {tmp_path}/out.nii.gz".split()
        return run_script("predict.py", *words, *(flags or ("--device", "cpu")))

    (tmp_path / "damaged.onnx").write_bytes(b"\x08\x0a\x12")
    other = onnx.load(exported)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    assert_one_line(run(tmp_path / "none.onnx"), "none.onnx", "no file at")
    assert_one_line(run(tmp_path / "damaged.onnx"), "damaged.onnx", "not an ONNX file")
    assert_one_line(run(tmp_path / "other.onnx"), "other.onnx", "no metadata", "export.py")
    assert_one_line(run(exported, "--amp", "bf16"), "--amp bf16", "float32")
    assert_one_line(run(exported, "--prediction", "last"), "--prediction last", "leave it out")
    if not torch.cuda.is_available():
        assert_one_line(run(exported, "--device", "cuda"), "--device cpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert_one_line(run(exported), "onnxruntime", "pip install -r requirements-export.txt")


@pytest.mark.parametrize("raises", [False, True], ids=["leaves it out", "raises"])
def test_auto_takes_the_cpu_where_the_cuda_provider_does_not_load(exported, refused, monkeypatch, caplog, raises):
    """Some versions of onnxruntime leave it out, others raise."""
    session = onnxruntime.InferenceSession

    def without_cuda(*arguments, providers):
        if raises and providers != ["CPUExecutionProvider"]:
            raise RuntimeError("libcurand.so.10: cannot open shared object file")
        return session(*arguments, providers=["CPUExecutionProvider"])

    monkeypatch.setattr("utils.onnx_network.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    OnnxNetwork(exported, "auto")
    assert "runs on the CPU" in caplog.text
    refused(lambda: OnnxNetwork(exported, "cuda"), "onnxruntime-gpu[cuda,cudnn]', or use --device cpu")


@pytest.mark.gpu
def test_an_export_computes_the_same_on_the_gpu(exported, model):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime here has no CUDA provider: onnxruntime-gpu is another package")
    export.check(exported, export.SummedLogits(model))
