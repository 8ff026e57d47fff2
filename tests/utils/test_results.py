"""Tables say what the frame says, and Markdown shows it so."""

import numpy as np
import pandas as pd

from utils.results import markdown


def test_markdown_aligns_numbers_to_the_right_and_escapes_bars():
    frame = pd.DataFrame({"class": ["a|b", "c\nd"], "Dice": [84.1, np.nan], "HD95": ["1.20 ± 0.3", "-"], "n": [1, 20]})
    lines = markdown(frame, floatfmt=".2f").splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["|", "a\\|b", "|", "84.10", "|", "1.20", "±", "0.3", "|", "1", "|"],
        ["|", "c", "d", "|", "-", "|", "-", "|", "20", "|"],
    ]
    assert [cell[-1] for cell in lines[1].strip("|").split("|")] == ["-", ":", ":", ":"]
    assert "index" in markdown(frame, index=True)
