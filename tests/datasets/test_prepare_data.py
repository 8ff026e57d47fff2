"""The script writes files and names the commands that come next."""


def test_phantom_and_the_commands_that_come_next(tmp_path, run_script):
    done = run_script("prepare_data.py", "phantom", "--out", tmp_path / "out", "--num_patients", 1, 1, 1, "--jobs", 1)
    assert done.status == 0, done.error
    for folder in ("train_npz", "test_vol_h5", "lists"):
        assert list((tmp_path / "out" / folder).iterdir())
    where = f"--root_path {tmp_path}/out/train_npz --volume_path {tmp_path}/out/test_vol_h5"
    assert f"python -m utils.verify phantom {where} --list_dir {tmp_path}/out/lists" in done.error
    assert f"python train_acdc.py {where}" in done.error
