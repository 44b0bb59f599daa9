"""Which words of a command line are KEY VALUE pairs."""

import pytest

from focal_plugin import ConfigError
from focal_plugin.ablation.__main__ import parse
from focal_plugin.config.explain import split_pairs
from focal_plugin.config.load import load_config

PAIRS = ["TEST.AUG.FLIP", "False", "MODEL.NO_SUCH", "p5"]


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["a.jpg", "IMG.JPG"], 2),
        (["a.jpg", *PAIRS], 1),
        (["a.jpg", *PAIRS[2:]], 1),  # looks like one: the config says what is wrong with it
        (["a.jpg", "MODEL.FOCAL.TIMM.TOP_BLOCK", "p5"], 1),  # renamed: so does it here
        (["TEST", "INPUT", "SEED", "1"], 2),  # sections are no keys
        (["0", "VIS.ENABLED", "True"], 1),  # the plugin's own
        (["model.device", "DIR.D/x", "SEED.png", "S", "MODEL.pth"], 5),
        (["--gamma", "0", "1", "OUTPUT_DIR", "x", "--not-a-flag"], 3),
        ([], 0),
        (PAIRS, 0),
    ],
)
def test_pairs_begin_at_the_first_word_that_looks_like_a_key(words, count):
    assert split_pairs(words) == (words[:count], words[count:])


def test_a_file_is_no_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL.PNG").write_text("")
    assert split_pairs(["MODEL.PNG", "SEED", "1"]) == (["MODEL.PNG"], ["SEED", "1"])
    (tmp_path / "MODEL.PNG").unlink()
    assert split_pairs(["MODEL.PNG", "1"]) == ([], ["MODEL.PNG", "1"])


def test_a_key_that_was_renamed(tiny_config):
    with pytest.raises(ConfigError, match=r"The command line.*renamed to MODEL\.FOCAL\.TOP_BLOCK"):
        load_config(tiny_config, ["MODEL.FOCAL.TIMM.TOP_BLOCK", "p5"])


def test_the_rows_of_an_ablation():
    args = parse(["TEST", "rows/a.yaml", "--seeds", "2", *PAIRS])
    assert (args.rows, args.opts, args.seeds) == (["TEST", "rows/a.yaml"], PAIRS, 2)


def test_a_section_that_is_a_word(tmp_path):
    (tmp_path / "my.yaml").write_text("MODEL:\n  RETINANET:\n    NUM_CLASSES 3\n")  # no colon: a text
    with pytest.raises(ConfigError, match=r"my\.yaml: MODEL\.RETINANET is NUM_CLASSES 3 \(str\); expected keys, each"):
        load_config(str(tmp_path / "my.yaml"))
