"""What README and docs say can be typed, followed and found."""

import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest

import datasets
from tests.conftest import ROOT
from utils.cli import ArgumentParser

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[dlpt]*/README.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
NOT_OURS = {"venv", "pip", "pytest", "torch.distributed.run"}
ADDED = {"spleen", "two_convolutions"}  # by the pages themselves, which are followed below and in test_registry.py


def blocks(text: str, language: str = "") -> list[str]:
    """Return the fenced blocks of a page in one language, none meaning the shell's."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[tuple[Path, list[str]]]:
    """Yield the script and the flags of every command of ours in a page's blocks."""
    for block in blocks(text):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r"([A-Z]+)=(\"?)(.*?)\2", line.split("  #")[0].strip()):
                variables[assigned[1]] = assigned[3]
            if not re.search(r"\b(python|torchrun)\b", line) or "python -c" in line:
                continue
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            words = shlex.split(line, comments=True)
            start = next((i for i, w in enumerate(words) if re.search(r"(^|/)(python|torchrun)$", w)), len(words))
            words = words[start:]
            if words[1:2] == ["-m"]:
                if words[2] not in NOT_OURS:
                    yield ROOT / f"{words[2].replace('.', '/')}.py", words[3:]
            elif script := next((i for i, word in enumerate(words) if word.endswith(".py")), None):
                yield ROOT / words[script], words[script + 1 :]


class Parsed(Exception):  # noqa: N818
    """A script has taken its flags."""


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_is_one_that_its_script_takes(page, run_script, monkeypatch):
    parse = ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parsed = parse(self, args, namespace)
        if args != []:  # those are defaults that a script looks up
            raise Parsed
        return parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    text = page.read_text(encoding="utf-8")
    found = list(commands(text))
    assert found or "python " not in "".join(blocks(text)).replace("python -", "")
    made_there = set(re.findall(r"> (\w+\.py)$", text, re.MULTILINE))
    for script, flags in found:
        if script.name in made_there or ADDED & set(flags):
            continue
        assert script.is_file(), script
        if flags:
            try:
                outcome = run_script(script, *flags)
            except Parsed:
                continue
            pytest.fail(f"{script.name} {shlex.join(flags)}: {outcome.error}")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_test_that_a_page_names_is_there(page):
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    for name in re.findall(r"(?<!-)\btest_[a-z0-9_]+(?=\.\.\.|`)", page.read_text(encoding="utf-8")):
        exists = f"def {name}" in sources or any(ROOT.glob(f"tests/**/{name}.py")) or (ROOT / f"{name}.py").is_file()
        assert exists, name


@pytest.fixture
def spleen(monkeypatch, tmp_path):
    """The data set of ``docs/adding_a_data_set.md``, entered, and the scripts it makes, in ``tmp_path``."""
    page = (ROOT / "docs/adding_a_data_set.md").read_text(encoding="utf-8")
    code, parser, branch = blocks(page, "python")
    module = types.ModuleType("datasets.spleen")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "spleen.py", "exec"), vars(module))
    monkeypatch.setattr(datasets, "spleen", module, raising=False)
    monkeypatch.setitem(datasets.DATASETS, "spleen", module.INFO)
    for line in re.findall(r"^sed .*$", page, re.MULTILINE):
        old, new, source, target = re.fullmatch(r"sed 's/(\w+)/(\w+)/g' (\S+) > (\S+)", line).groups()
        (tmp_path / target).write_text((ROOT / source).read_text(encoding="utf-8").replace(old, new))
    prepare = (ROOT / "prepare_data.py").read_text(encoding="utf-8")
    for old, new in (
        ("phantom, segpc,", "phantom, segpc, spleen,"),
        ("    made = kinds", f"{parser}\n    made = kinds"),
        ("mr, cells", "mr, organ, cells"),
        ("    else:\n        names =", f"{branch}    else:\n        names ="),
    ):
        assert old in prepare
        prepare = prepare.replace(old, new)
    (tmp_path / "prepare_data.py").write_text(prepare)
    return tmp_path


def test_the_data_set_of_the_docs_is_prepared_checked_trained_and_tested_on(spleen, tmp_path, run_script):
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / folder).mkdir(parents=True)
    for number in range(10):
        label = np.zeros((40, 36, 4), np.uint8)
        label[8:20, 6:18] = 1
        image = np.where(label == 1, 100, -50) + rng.normal(0, 10, label.shape)
        for folder, array in (("imagesTr", image.astype(np.int16)), ("labelsTr", label)):
            file = nibabel.Nifti1Image(array, np.diag([-0.8, -0.8, 5, 1]))
            nibabel.save(file, tmp_path / "raw" / folder / f"spleen_{number}.nii.gz")
    out = tmp_path / "spleen"
    run = tmp_path / "run"
    lists = "--list_dir", out / "lists"
    data = "--volume_path", out / "test_vol_h5", *lists
    small = "--model_scale", "pico", "--pretrained", "none", "--img_size", 32, "--img_size_dmwla", 32
    small += "--max_iterations", 2, "--batch_size", 2, "--num_workers", 0, "--output_dir", run
    for script, *flags in (
        (spleen / "prepare_data.py", "spleen", "--raw", tmp_path / "raw", "--out", out, "--jobs", 1),
        ("utils/verify.py", "spleen", "--root_path", out / "train_npz", *data),
        (spleen / "train_spleen.py", "--root_path", out / "train_npz", *data, *small),
        (spleen / "test_spleen.py", "--checkpoint", run / "best.pth", *data),
    ):
        done = run_script(script, *flags)
        assert done.status == 0, done.error
    assert [
        len((out / "lists" / f"{split}.txt").read_text(encoding="utf-8").split()) for split in ("train", "val", "test")
    ] == [
        7,
        1,
        2,
    ]
    cases = (run / "results_test" / "cases.csv").read_text(encoding="utf-8")
    assert ",spleen," in cases and ",mm," in cases
    with np.load(next((out / "train_npz").glob("*.npz"))) as saved:
        np.testing.assert_allclose(saved["image"][saved["label"] == 1].mean(), 260 / 400, atol=0.02)
