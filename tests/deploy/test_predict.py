import csv
import json
import os
import re
import signal
from pathlib import Path

import cv2
import geojson
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO

from focal_plugin.commands.train import main as train
from focal_plugin.data import register_local_dataset
from focal_plugin.deploy import DenseTTA, Predictor, media, predict
from focal_plugin.deploy.inputs import ImageError, find_sources
from focal_plugin.deploy.predict import main
from focal_plugin.deploy.results import Results
from tests.docs.pages import PAGES, blocks, commands

PAGE = PAGES["docs/prediction.md"]


@pytest.fixture
def run(tiny_config, weights, tmp_path):
    """Calls the command with the tiny detector and the output folder ``out``, and returns its exit code."""

    def call(*words):
        return main(["--config-file", tiny_config, "--weights", weights, "--output", str(tmp_path / "out"), *words])

    return call


def load(folder, name="detections.json"):
    return json.loads((folder / name).read_text())


def files(folder):
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_a_folder_with_images_that_do_not_open(run, tmp_path, capsys, batch):
    images = tmp_path / "shapes_test"
    (images / "broken.JPG").write_text("no image")
    (images / "link.png").symlink_to("nothing")
    (images / "notes.txt").write_text("not for us")
    (images / "deeper.png").mkdir()
    Image.new("RGB", (4000, 1)).save(images / "line.png")
    Image.open(images / "0.png").save(images / "first.jpg")
    assert run(str(images), "--batch", str(batch)) == 1
    pictures = ["0.png", "1.png", "2.png", "3.png", "first.jpg"]
    assert files(tmp_path / "out") == sorted([*pictures, "detections.json", "images.json"])
    listed = load(tmp_path / "out", "images.json")["images"]
    assert [image["file_name"] for image in listed] == [str(images / name) for name in pictures]
    stderr = capsys.readouterr().err
    assert "3 of 8 inputs" in stderr and "notes" not in stderr
    assert all(name in stderr for name in ("broken.JPG", "link.png", "line.png"))


def test_the_json_is_cocos_and_the_pictures_show_it(run, tiny_config, weights, tmp_path, capsys):
    """Of a data set whose category ids are not the indices of the classes."""
    path = str(tmp_path / "shapes_test/1.png")
    assert run(path, "--score-thresh", ".4", "--no-optimize") == 0
    truth = COCO(str(tmp_path / "out/images.json"))
    found = truth.loadRes(str(tmp_path / "out/detections.json"))
    assert found.loadImgs([1]) == [{"id": 1, "file_name": path, "annotated": "1.png", "height": 64, "width": 64}]
    assert truth.loadCats([1, 2]) == [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]

    expected = Predictor(tiny_config, weights, optimize=False, score_thresh=0.4)(path)
    detections = found.loadAnns(found.getAnnIds([1]))
    assert len(detections) == len(expected) > 3
    assert [d["score"] for d in detections] == expected.scores.tolist()
    assert [d["category_id"] - 1 for d in detections] == expected.pred_classes.tolist()
    boxes = expected.pred_boxes.tensor.numpy()
    np.testing.assert_allclose([d["bbox"] for d in detections], np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]))

    drawn, plain = np.array(Image.open(tmp_path / "out/1.png")).astype(int), np.array(Image.open(path)).astype(int)
    assert drawn.shape == plain.shape
    changed = np.abs(drawn - plain).max(axis=2) > 30
    assert 0.02 < changed.mean() < 0.98


def test_images_together_are_as_one_by_one(run, tmp_path, monkeypatch):
    """In the order given, one of them twice; a batch goes through the network at once."""
    numbers, detect = [], Predictor.detect
    monkeypatch.setattr(Predictor, "detect", lambda self, images: numbers.append(len(images)) or detect(self, images))
    words = [str(tmp_path / f"shapes_test/{i}.png") for i in (2, 0, 3, 0, 1)]
    results = []
    for options in ([], ["--batch", "2"]):
        assert run(*words, *options, "--no-optimize") == 0
        name = "-2.json" if options else ".json"
        results.append([load(tmp_path / "out", part + name) for part in ("detections", "images")])
    assert numbers == [1] * 5 + [2, 2, 1]
    (one, listed), (together, listed_together) = results
    assert [x["file_name"] for x in listed["images"]] == words
    assert [x["file_name"] for x in listed_together["images"]] == words
    assert len(one) == len(together) > 5
    for a, b in zip(one, together):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert [*a["bbox"], a["score"]] == pytest.approx([*b["bbox"], b["score"]], abs=1e-2)


def test_nothing_is_overwritten(run, tmp_path):
    path = str(tmp_path / "shapes_test/0.png")
    assert run(path, path) == run(path) == 0
    out = tmp_path / "out"
    names = ["0-2.png", "0-3.png", "0.png", "detections-2.json", "detections.json", "images-2.json", "images.json"]
    assert files(out) == names
    assert [image["annotated"] for image in load(out, "images.json")["images"]] == ["0.png", "0-2.png"]
    assert [image["annotated"] for image in load(out, "images-2.json")["images"]] == ["0-3.png"]
    (out / "images.json").unlink()
    assert run(path) == 0
    assert {"detections-3.json", "images-3.json"} <= set(files(out))  # the two belong together


def test_every_option_reaches_the_predictor(run, tmp_path, monkeypatch):
    made = []

    class Recorded(Predictor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append((self, options))

    monkeypatch.setattr(predict, "Predictor", Recorded)
    path = str(tmp_path / "shapes_test/0.png")
    options = [
        "--score-thresh",
        ".3",
        "--tile",
        "48",
        "--overlap",
        "8",
        "--no-optimize",
        "--tta",
        "--batch",
        "3",
        "--no-whole-image",
    ]
    assert run(path, *options, "TEST.AUG.MIN_SIZES", "(32, 48)", "SEED", "-1", "MODEL.DEVICE", "cpu") == 0
    predictor, found = made.pop()
    expected = {
        "score_thresh": ".3",
        "tile": 48,
        "overlap": 8,
        "optimize": False,
        "tta": True,
        "batch_size": 3,
        "whole_image": False,
    }
    assert {key: found[key] for key in expected} == expected and predictor.score_thresh == 0.3
    assert isinstance(predictor.model, DenseTTA) and predictor.model.mapper.min_sizes == (32, 48)
    assert predictor._windows(64, 64) == [(x, y, x + 48, y + 48) for y in (0, 16) for x in (0, 16)]
    assert all(detection["score"] >= 0.3 for detection in load(tmp_path / "out"))
    assert run(path) == 0
    predictor, found = made.pop()
    expected = {
        "score_thresh": "0.5",
        "tile": 0,
        "overlap": None,
        "optimize": True,
        "tta": None,
        "batch_size": 1,
        "whole_image": True,
    }
    assert {key: found[key] for key in expected} == expected
    assert not isinstance(predictor.model, DenseTTA)


def test_the_threshold_of_an_evaluation(run, tiny_config, weights, tmp_path, capsys, loggers):
    """That the command ``eval`` has found."""
    assert train(["--eval-only", "--config-file", tiny_config, "MODEL.WEIGHTS", weights, "MODEL.DEVICE", "cpu"]) == 0
    path = tmp_path / "output/inference/evaluation.json"
    found = json.loads(path.read_text())
    found["overall"]["best_f1"] = {"score_thresh": 0.4}
    path.write_text(json.dumps(found))
    capsys.readouterr()
    image = str(tmp_path / "shapes_test/1.png")
    assert run(image, "--score-thresh", str(path)) == 0
    assert run(image, "--score-thresh", ".4") == 0
    assert load(tmp_path / "out") == load(tmp_path / "out", "detections-2.json") != []
    found["overall"]["best_f1"] = None
    path.write_text(json.dumps(found))
    assert run(image, "--score-thresh", str(path)) == 2
    assert "evaluation.json has no best threshold" in capsys.readouterr().err


def test_what_cannot_begin_is_an_error_and_leaves_nothing(run, tiny_config, tmp_path, capsys):
    image = str(tmp_path / "shapes_test/0.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for words, expected in [
        ([str(tmp_path / "none.png")], "none.png"),
        ([str(tmp_path / "empty")], "without an image"),
        ([str(tmp_path / "*.mp4")], "No file matches"),
        (["20260101123456789012"], "There is no 20260101123456789012"),
        (["MODEL.DEVICE", "cpu"], "Nothing to predict on"),
        ([image, "MODEL.DEVICE"], "expected pairs of a key and its value"),
        ([image, "MODEL.DEVISE", "cpu"], "no key MODEL.DEVISE. Near it: MODEL.DEVICE"),
        ([image, "SEED", "1", "MODEL.DEVISE", "cpu"], "no key MODEL.DEVISE"),
        ([image, "--score-thresh", "50"], "score_thresh is 50"),
        ([image, "--score-thresh", "none.json"], "none.json"),
        ([image, "--score-thresh", tiny_config], "tiny.yaml is no evaluation.json"),
        ([image, "--overlap", "50"], "overlap 50"),
        ([image, "--batch", "0"], "batch_size is 0"),
        ([image, "--weights", str(tmp_path / "none.pth")], "none.pth"),
        ([image, "--config-file", "none.yaml"], "none.yaml"),
        ([image, "--output", str(tmp_path / "file")], str(tmp_path / "file")),
    ]:
        assert run(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error, words
    assert not (tmp_path / "out").exists()


# Videos and cameras


@pytest.fixture
def video(tmp_path):
    """A video of twelve frames of 64 × 96 pixels, with a square that moves."""
    path = str(tmp_path / "square.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 12.5, (96, 64))
    if not writer.isOpened():
        pytest.skip(f"OpenCV {cv2.__version__} was built without a codec that writes MJPG.")
    for x in range(12):
        frame = np.zeros((64, 96, 3), np.uint8)
        frame[10:30, 4 * x : 4 * x + 20] = (40, 200, 90)
        writer.write(frame)
    writer.release()
    return path


def frames(path):
    capture = cv2.VideoCapture(str(path))
    while (read := capture.read())[0]:
        yield read[1]


def test_a_video(run, video, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    assert run(video, str(broken), "--score-thresh", ".6", "--csv", "--geojson") == 1
    (written,) = (path for path in (tmp_path / "out").glob("square.*") if path.suffix != ".geojson")
    expected = list(frames(video))
    drawn = list(frames(written))
    assert [frame.shape for frame in drawn] == [(64, 96, 3)] * 12
    assert cv2.VideoCapture(str(written)).get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
    assert np.abs(drawn[5].astype(int) - expected[5]).mean() < 60  # the same frame, in the same order of colours
    images = load(tmp_path / "out", "images.json")["images"]
    assert [(image["file_name"], image["frame_id"], image["annotated"]) for image in images] == [
        (video, number, written.name) for number in range(12)
    ]
    frames_of = [detection["image_id"] - 1 for detection in load(tmp_path / "out")]
    assert set(frames_of) <= set(range(12)) and len(set(frames_of)) > 1
    rows = [row for row in rows_of(tmp_path / "out/detections.csv") if row["score"]]
    assert [int(row["frame_id"]) for row in rows] == frames_of
    features = load(tmp_path / "out", "square.geojson")["features"]
    assert [feature["properties"]["frame_id"] for feature in features] == frames_of
    assert run(video) == 0
    assert (tmp_path / "out" / f"square-2{written.suffix}").exists()


class Camera:
    """Stands in for cv2.VideoCapture: three frames, then Ctrl+C."""

    def __init__(self, number):
        assert number == 3
        self.frames = iter([np.full((64, 64, 3), value, np.uint8) for value in (0, 100, 200)])

    def isOpened(self):
        return True

    def get(self, what):
        return 0.0

    def read(self):
        frame = next(self.frames, None)
        if frame is None:
            raise KeyboardInterrupt
        return True, frame

    def release(self):
        self.frames = None


def test_a_camera_runs_until_it_is_stopped(run, video, tmp_path, monkeypatch):
    monkeypatch.setattr(media.cv2, "VideoCapture", Camera)
    assert run("3") == 0
    images = load(tmp_path / "out", "images.json")["images"]
    assert [(image["file_name"], image["frame_id"]) for image in images] == [("camera 3", i) for i in range(3)]
    monkeypatch.undo()
    (written,) = (tmp_path / "out").glob("camera 3.*")
    assert len(list(frames(written))) == 3


def test_a_build_of_opencv_without_codecs_says_so(video, tmp_path, monkeypatch):
    class NoWriter:
        def __init__(self, *args):
            pass

        def isOpened(self):
            return False

        def release(self):
            pass

    monkeypatch.setattr(media.cv2, "VideoWriter", NoWriter)
    output = media.VideoOutput([str(tmp_path / "a.mp4"), str(tmp_path / "a.avi")], 25, Metadata())
    with pytest.raises(OSError, match=r"can write none of .*a\.mp4, .*a\.avi"):
        output.add(np.zeros((8, 8, 3), np.uint8), None)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_csv_is_a_data_set(run, tiny_config, weights, tmp_path, monkeypatch):
    """Read back by the format ``csv``, an image without detections too."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (104, 116, 124)).save("shapes_test/plain, grey.png")
    paths = [f"shapes_test/{name}" for name in ("0.png", "plain, grey.png", "1.png")]
    assert run(*paths, "--csv", "--score-thresh", ".6", "--no-optimize") == 0
    found = Predictor(tiny_config, weights, score_thresh=0.6, optimize=False)(paths)
    assert len(found[0]) and not len(found[1]) and len(found[2])
    register_local_dataset({"name": "found", "format": "csv", "csv": "out/detections.csv", "images": "."})
    records = {record["image_id"]: record for record in DatasetCatalog.get("found")}
    assert list(records) == paths
    for path, instances in zip(paths, found):
        boxes = torch.tensor([box["bbox"] for box in records[path]["annotations"]]).reshape(-1, 4)
        assert boxes.equal(instances.pred_boxes.tensor)
    classes = ["square", "disc"]
    rows = [row for row in rows_of("out/detections.csv") if row["score"]]
    assert [row["label"] for row in rows] == [classes[k] for one in found for k in one.pred_classes.tolist()]
    assert [np.float32(row["score"]) for row in rows] == [score for one in found for score in one.scores.tolist()]
    assert run(paths[0]) == 0 and run(paths[0], "--csv") == 0
    assert {"detections-2.json", "detections-3.json", "detections-3.csv"} <= set(files(tmp_path / "out"))
    assert "detections-2.csv" not in files(tmp_path / "out")


def test_geojson_has_a_polygon_for_each_detection(run, tmp_path):
    """Of each image a file of its own, valid to a reader of GeoJSON, with what QuPath reads."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/1.geojson").write_text("mine")
    assert run(str(tmp_path / "shapes_test"), "--geojson", "--score-thresh", ".6") == 0
    names = ["0.geojson", "1-2.geojson", "2.geojson", "3.geojson"]
    assert [name for name in files(tmp_path / "out") if name.endswith("geojson")] == sorted([*names, "1.geojson"])
    truth = load(tmp_path / "out", "images.json")
    assert [image["annotated"] for image in truth["images"]] == [f"{name[:-8]}.png" for name in names]
    categories = {category["id"]: category["name"] for category in truth["categories"]}
    detections = load(tmp_path / "out")
    for image, name in zip(truth["images"], names):
        collection = geojson.loads((tmp_path / "out" / name).read_text())
        assert isinstance(collection, geojson.FeatureCollection) and collection.is_valid and not collection.errors()
        assert collection["image"] == image["file_name"]
        expected = [one for one in detections if one["image_id"] == image["id"]]
        for feature, one in zip(collection["features"], expected, strict=True):
            x, y = np.array(feature["geometry"]["coordinates"][0]).T
            assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 == pytest.approx(one["bbox"][2] * one["bbox"][3])
            assert [x.min(), y.min(), np.ptp(x), np.ptp(y)] == pytest.approx(one["bbox"])
            properties, label = feature["properties"], categories[one["category_id"]]
            assert (properties["label"], properties["score"]) == (label, one["score"])
            assert properties["objectType"] == "detection" and properties["measurements"] == {"score": one["score"]}
            assert properties["classification"]["name"] == label and len(properties["classification"]["color"]) == 3


def test_a_data_set_without_names_has_numbers_for_labels(tmp_path):
    results = Results(Metadata(), str(tmp_path), csv=True)
    found = Instances((9, 9), pred_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])), scores=torch.tensor([0.1]))
    found.pred_classes = torch.tensor([7])
    results.add(found, [], file_name="a.png", annotated="a.png")
    assert results.close()[-1] == str(tmp_path / "detections.csv")
    assert rows_of(tmp_path / "detections.csv")[0]["label"] == "7"


def test_ids_without_names(tmp_path):
    """The categories have the ids that the detections have: class 0 is 1 in the data set, and class 1 is 9."""
    results = Results(Metadata(thing_dataset_id_to_contiguous_id={1: 0, 9: 1}), str(tmp_path))
    boxes = Boxes(torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]]))
    found = Instances((9, 9), pred_boxes=boxes, scores=torch.tensor([0.2, 0.1]), pred_classes=torch.tensor([0, 1]))
    results.add(found, [], file_name="a.png", annotated="a.png")
    detections, images = (json.loads(Path(path).read_text()) for path in results.close())
    assert [one["category_id"] for one in detections] == [1, 9]
    assert images["categories"] == [{"id": 1, "name": "1"}, {"id": 9, "name": "9"}]


@pytest.mark.parametrize("where", ["picture", "json"])
def test_a_full_disk_is_an_error_that_keeps_what_was_done(run, tmp_path, monkeypatch, capsys, where):
    """The JSON files are whole, with all images before."""
    add = predict.Results.add

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "the disk")

    def add_and_fill_the_disk(self, *args, **kwargs):
        add(self, *args, **kwargs)
        if where == "picture":
            monkeypatch.setattr(predict, "draw", full)
        else:
            monkeypatch.setattr(self.detections, "add", full)

    monkeypatch.setattr(predict.Results, "add", add_and_fill_the_disk)
    assert run(str(tmp_path / "shapes_test"), "--csv", "--geojson") == 1
    error = capsys.readouterr().err
    assert "error: [Errno 28] No space left on device: 'the disk'" in error and "Traceback" not in error
    assert (tmp_path / "out/0.png").exists()
    assert len(load(tmp_path / "out", "images.json")["images"]) == 1
    assert {found["image_id"] for found in load(tmp_path / "out")} == {1}
    assert {row["image_path"] for row in rows_of(tmp_path / "out/detections.csv")} == {
        str(tmp_path / "shapes_test/0.png")
    }
    assert load(tmp_path / "out", "0.geojson")["features"]
    assert where == "picture" or load(tmp_path / "out", "1.geojson")["features"] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_it_keeps_what_was_done(tiny_config, weights, tmp_path, number):
    """COCO's tools read the files as they are then."""
    child = os.fork()
    if not child:
        detect, count = Predictor.detect, iter(range(9))

        def killed(self, images):
            if next(count) == 3:
                os.kill(os.getpid(), number)
            return detect(self, images)

        Predictor.detect = killed
        words = ["--config-file", tiny_config, "--weights", weights, "--output", str(tmp_path / "out")]
        try:
            main([*words, str(tmp_path / "shapes_test")])
        except SystemExit as error:
            os._exit(error.code)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (143 if number == signal.SIGTERM else -number)
    truth = COCO(str(tmp_path / "out/images.json"))
    assert [Path(image["file_name"]).name for image in truth.dataset["images"]] == ["0.png", "1.png", "2.png"]
    found = truth.loadRes(str(tmp_path / "out/detections.json"))
    assert {found["image_id"] for found in found.dataset["annotations"]} == {1, 2, 3}


def test_ctrl_c_keeps_what_was_done(run, tmp_path, monkeypatch, capsys):
    detect = Predictor.detect

    def interrupted(self, images):
        if not hasattr(self, "done"):
            self.done = True
            return detect(self, images)
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "detect", interrupted)
    assert run(str(tmp_path / "shapes_test")) == 130
    assert len(load(tmp_path / "out", "images.json")["images"]) == 1


# The command line's words


def test_what_the_words_stand_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/2.png", "a/1.JPG", "a/b/3.webp", "a/film.MP4", "7", "c/5.avif", "c/4.jfif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for word, expected in {
        "a": [("a/1.JPG", "image"), ("a/2.png", "image")],
        "a/*": [("a/1.JPG", "image"), ("a/2.png", "image"), ("a/film.MP4", "video")],
        "a/**/*.webp": [("a/b/3.webp", "image")],
        "a/film.MP4": [("a/film.MP4", "video")],
        "c": [("c/4.jfif", "image"), ("c/5.avif", "image")],
        "0": [("0", "camera")],
        "7": [("7", "image")],  # a file of that name
    }.items():
        assert [(source.path, source.kind) for source in find_sources([word])] == expected
    assert len(find_sources(["a", "0", "a/2.png"])) == 4
    with pytest.raises(ImageError, match="There is no b"):
        find_sources(["a", "b"])


# The page on prediction


@pytest.fixture
def after_the_demo(tiny_config, weights, video, tmp_path, monkeypatch):
    """A folder with what the page's lines name."""
    monkeypatch.chdir(tmp_path)
    for path, source in {
        "output/quickstart/config.yaml": tiny_config,
        "output/quickstart/model_final.pth": weights,
        "datasets/quickstart_trees/val/images/a.png": "shapes_test/0.png",
        "survey.png": "shapes_test/1.png",
        "photos/2026/b.jpg": "shapes_test/2.png",
        "flight.mp4": video,
    }.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(Path(source).absolute())


def test_the_commands_run_as_printed(after_the_demo, tmp_path):
    assert len(commands(PAGE)) == 2
    for command in commands(PAGE):
        assert command[:2] == ["focal", "predict"]
        small = ["TEST.AUG.MIN_SIZES", "(48,)"] if "TEST.AUG.MIN_SIZES" in command else []  # overrides, to save time
        assert main([*command[2:], *small]) == 0
    out = tmp_path / "output/found"
    assert [len(load(out, name)["images"]) for name in ("images.json", "images-2.json")] == [1, 14]


def test_the_lines_of_python_run_as_printed(after_the_demo):
    (code,) = blocks(PAGE, "python")
    assert len([line for line in code.splitlines() if line]) == 3
    variables = {}
    exec(code, variables)
    assert {"pred_boxes", "scores", "pred_classes"} <= set(variables["instances"].get_fields())


def test_the_options_are_listed():
    parser = predict.build_parser()
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    listed = set(re.findall(r"^\| `(--[\w-]+)", PAGE, re.MULTILINE))
    assert listed == options - {"--help", "--config-file", "--weights", "--output"}


def test_nothing_found_names_the_threshold(run, tmp_path, capsys):
    assert run(str(tmp_path / "shapes_test/0.png"), "--score-thresh", "1") == 0
    assert "1 images, 0 detections with a score of at least 1 (--score-thresh). Written: " in capsys.readouterr().out
