"""In every analysis, a mistake of the user is one line on stderr and an exit code of 2."""

import json
import re
from pathlib import Path

import pytest

from focal_plugin.analysis.__main__ import main


@pytest.mark.parametrize(
    ("prog", "name"), [("focal analysis", "focal analysis"), (None, "python -m focal_plugin.analysis")]
)
@pytest.mark.parametrize("what", [[], ["anchors"]])
def test_the_name_in_usage_lines(prog, name, what, capsys):
    with pytest.raises(SystemExit) as end:
        main([*what, "--help"], prog)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {' '.join([name, *what])} ")


@pytest.mark.parametrize(
    "opts, message",
    [
        (["MODEL.NOPE", "3"], "MODEL.NOPE"),
        (["MODEL.FOCAL.IMPORTS", "['no_module']"], "MODEL.FOCAL.IMPORTS names 'no_module'"),
        (["MODEL.RETINANET.NUM_CLASSES", "5"], "MODEL.RETINANET.NUM_CLASSES is 5, but 'shapes_train' has 2"),
    ],
)
def test_a_wrong_config(tiny_config, capsys, opts, message):
    assert main(["init", "--config-file", tiny_config, *opts]) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["loss-cdf", "--weights", "MODEL.pth", "--config-file", "TINY", "--gamma", "0", "1"],
            "MODEL.pth, which",
        ),
        (["speed", "--runs", "TINY", "--ap", "tiny=high"], "--ap tiny=high"),
        (["speed", "--ap", "tiny=high", "--runs", "TINY"], "--ap tiny=high"),
    ],
)
def test_keys_after_a_flag_of_several_values(tiny_config, capsys, words, message):
    words = [tiny_config if word == "TINY" else word for word in words]
    assert main([*words, "SEED", "3", "MODEL.DEVICE", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert main([*words, "MODEL.NO_SUCH", "3"]) == 2
    assert "no key MODEL.NO_SUCH" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["init", "anchors", "loss-cdf"])
def test_a_config_that_is_not_there(capsys, what):
    assert main([what, "--config-file", "nowhere.yaml"]) == 2
    assert "--config-file nowhere.yaml: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["init", "anchors"])
def test_no_box_at_all(tiny_config, capsys, what):
    path = Path(tiny_config).parent / "shapes_train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    assert main([what, "--config-file", tiny_config, "MODEL.DEVICE", "cpu"]) == 2
    assert "DATASETS.TRAIN names shapes_train" in capsys.readouterr().err


def test_an_image_that_does_not_open(tiny_config, capsys):
    for image in (Path(tiny_config).parent / "shapes_train").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    assert main(["init", "--config-file", tiny_config, "MODEL.DEVICE", "cpu"]) == 2
    assert ".png" in capsys.readouterr().err
