"""Every command, link and name in README and docs works, and their examples run."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

import datasets
from networks import NETWORKS
from tests.conftest import ROOT
from utils.checkpoint import load_checkpoint
from utils.cli import ArgumentParser

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[dlpt]*/README.md")])
on_every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
OTHER_PROGRAMS = {"venv", "pip", "pytest", "torch.distributed.run"}
ADDED = {"spleen", "two_convolutions"}  # added by the pages themselves; the last test follows them


def blocks(text: str, language: str = "") -> list[str]:
    """Return the fenced blocks of a page in a language; shell commands have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for of, block in found if of == language]


def commands(text: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield script and flags of each of our commands in a page's blocks."""
    for block in blocks(text):
        block = block.replace("\\\n", " ")
        for name, value in re.findall(r'^([A-Z]+)="?(.*?)"?(?:  +#.*)?$', block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        for line in re.findall(r"\b(?:python|torchrun) (?!-c).*", block):
            _, *words = shlex.split(line, comments=True)
            if words[0] != "-m":
                script = next(i for i, word in enumerate(words) if word.endswith(".py"))
                yield ROOT / words[script], words[script + 1 :]
            elif words[1] not in OTHER_PROGRAMS:
                yield ROOT / f"{words[1].replace('.', '/')}.py", words[2:]


class Parsed(Exception):  # noqa: N818
    """A script accepted its flags."""


@on_every_page
def test_scripts_accept_every_command(page, run_script, monkeypatch):
    parse = ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parsed = parse(self, args, namespace)
        if args != []:  # a script reads its defaults with []
            raise Parsed
        return parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(datasets.custom, "info_of", lambda folder, fold=0: datasets.custom.INFO)  # nothing is prepared
    for script, flags in commands(page.read_text(encoding="utf-8")):
        if "spleen" in script.name or ADDED & set(flags):
            continue
        assert script.is_file(), script
        if flags:
            try:
                outcome = run_script(script, *flags)
            except Parsed:
                continue
            pytest.fail(f"{script.name} {shlex.join(flags)}: {outcome.error}")


@on_every_page
def test_links_and_named_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    for path, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        file = page.parent / path if path else page
        assert file.exists(), path
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in re.findall(r"(?<!-)\btest_[a-z0-9_]+(?=\.\.\.|`)", text):
        files = *ROOT.glob(f"tests/**/{name}.py"), *ROOT.glob(f"{name}.py")
        assert f"def {name}" in sources or files, name


@pytest.fixture
def added(monkeypatch, tmp_path):
    """Add the data set and the network of the two pages ``docs/adding_*.md``; write the scripts into ``tmp_path``."""
    exec(blocks((ROOT / "docs/adding_a_network.md").read_text(encoding="utf-8"), "python")[0], {})
    page = (ROOT / "docs/adding_a_data_set.md").read_text(encoding="utf-8")
    *_, code, entry = blocks(page, "python")
    module = types.ModuleType("datasets.spleen")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "spleen.py", "exec"), vars(module))
    monkeypatch.setattr(datasets, "spleen", module, raising=False)
    monkeypatch.setitem(datasets.DATASETS, "spleen", module.INFO)
    for old, new, source, target in re.findall(r"^sed 's/(\w+)/(\w+)/g' (\S+) > (\S+)$", page, re.MULTILINE):
        (tmp_path / target).write_text((ROOT / source).read_text(encoding="utf-8").replace(old, new))
    prepare = (ROOT / "prepare_data.py").read_text(encoding="utf-8")
    for old, new in (("phantom, segpc,", "phantom, segpc, spleen,"), ("SETS = {\n", f"SETS = {{\n{entry}")):
        assert old in prepare
        prepare = prepare.replace(old, new)
    (tmp_path / "prepare_data.py").write_text(prepare)
    yield tmp_path
    del NETWORKS["two_convolutions"]


def test_the_training_loop_of_the_page_trains_the_network_and_its_memory():
    loop = blocks((ROOT / "docs/adding_a_network.md").read_text(encoding="utf-8"), "python")[1]
    loop = loop.replace("warmup_iterations=400", "warmup_iterations=1").replace("start_epoch=100", "start_epoch=1")
    names = {"epochs": 2, "loader": [(torch.rand(2, 1, 64, 64), torch.randint(4, (2, 64, 64)))]}
    exec(loop, names)
    assert not any(bank.in_warmup for bank in names["model"].memory_banks()) and names["k"] is not None


def test_the_added_data_set_and_network_are_prepared_checked_trained_and_tested(added, tmp_path, run_script):
    rng = np.random.default_rng(0)
    for number in range(10):
        label = np.zeros((40, 36, 4), np.uint8)
        label[8:20, 6:18] = 1
        image = np.where(label == 1, 100, -50) + rng.normal(0, 10, label.shape)
        for folder, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", label)):
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            file = nibabel.Nifti1Image(array, np.diag([-0.8, -0.8, 5, 1]))
            nibabel.save(file, tmp_path / "raw" / folder / f"spleen_{number}.nii.gz")
    out, run = tmp_path / "spleen", tmp_path / "run"
    data = "--volume_path", out / "test_vol_h5", "--list_dir", out / "lists"
    small = "--network two_convolutions --width 4 --img_size 32 --max_iterations 2 --num_workers 0".split()
    train = added / "train_spleen.py", "--root_path", out / "train_npz", *data
    for script, *flags in (
        (added / "prepare_data.py", "spleen", "--raw", tmp_path / "raw", "--out", out, "--jobs", 1),
        ("utils/verify.py", "spleen", "--root_path", out / "train_npz", *data),
        (*train, *small, "--output_dir", run),
        (*train, "--resume", run / "last.pth", "--max_iterations", 3),
        (added / "test_spleen.py", "--checkpoint", run / "best.pth", *data),
    ):
        run_script(script, *flags).succeeded()
    assert [len((out / f"lists/{part}.txt").read_text().split()) for part in ("train", "val", "test")] == [7, 1, 2]
    history = pd.read_csv(run / "metrics.csv")
    assert list(history["iteration"]) == [1, 2, 3] and "k" not in history  # it has no memory
    assert load_checkpoint(run / "last.pth")["network"]["width"] == 4
    cases = (run / "results_test" / "cases.csv").read_text(encoding="utf-8")
    assert ",spleen," in cases and ",mm," in cases
    with np.load(next((out / "train_npz").glob("*.npz"))) as saved:
        np.testing.assert_allclose(saved["image"][saved["label"] == 1].mean(), 260 / 400, atol=0.02)
