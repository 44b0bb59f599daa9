import json
import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from focal_plugin import add_focal_config, merge_from_file
from focal_plugin.config.load import load_config
from focal_plugin.data import DataError, FocalDatasetMapper, register_local_datasets
from focal_plugin.deploy import ImageError, Predictor, fast_dtype, optimize_for_inference
from focal_plugin.deploy.loading import class_metadata
from focal_plugin.engine import Trainer
from focal_plugin.files.safe_load import WeightsError


def assert_same(actual, expected, atol=0.0):
    assert len(expected) > 10
    assert actual.image_size == expected.image_size
    assert actual.pred_classes.equal(expected.pred_classes)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=atol)
    torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=0, atol=atol)


def plain_model(cfg, weights):
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    return model


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")  # Detectron2's mapper, of grey images
@pytest.mark.parametrize("image_format", ["BGR", "RGB", "L"])
def test_it_finds_what_evaluation_finds(image_format, tiny_config, tmp_path):
    """In files, in arrays as OpenCV's, one and several, with the test loader's resizing."""
    opts = ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", image_format, "INPUT.MIN_SIZE_TEST", 96]
    if image_format == "L":
        opts += ["MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [50.0]]
    cfg = load_config(tiny_config, opts)
    model = build_model(cfg).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    batches = list(Trainer.build_test_loader(cfg, "shapes_test"))[:2]
    with torch.no_grad():
        expected = [model(batch)[0]["instances"] for batch in batches]
    paths = [batch[0]["file_name"] for batch in batches]

    options = {"optimize": False, "score_thresh": None}
    predictor = Predictor(tiny_config, tmp_path / "model.pth", opts=opts, **options)
    for actual in (
        predictor(paths),
        [predictor(cv2.imread(path)) for path in paths],
        Predictor(cfg, tmp_path / "model.pth", **options)(tmp_path / path for path in paths),
    ):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    assert predictor([]) == []


def test_the_optimised_model_is_the_default(tiny_config, weights, tmp_path):
    image = cv2.imread(str(tmp_path / "shapes_test/0.png"))
    default = Predictor(tiny_config, weights, score_thresh=None)
    plain = Predictor(tiny_config, weights, optimize=False, score_thresh=None)
    assert next(default.model.backbone.parameters()).dtype == fast_dtype("cpu")
    assert next(plain.model.backbone.parameters()).dtype == torch.float32
    default.model = optimize_for_inference(plain.model, torch.float32)
    assert_same(default(image), plain(image), atol=1e-2)


def test_several_images_go_through_the_network_together(tiny_config, weights, tmp_path):
    predictor = Predictor(tiny_config, weights, optimize=False, batch_size=3, score_thresh=None)
    paths = [str(tmp_path / f"shapes_test/{i}.png") for i in range(4)]
    sizes = []
    predictor.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    together = predictor(paths)
    assert sizes == [3, 1]
    for path, found in zip(paths, together, strict=True):
        assert_same(found, predictor(path), atol=1e-3)


def test_the_threshold(tiny_config, weights, tmp_path):
    path = tmp_path / "shapes_test/0.png"
    everything = Predictor(tiny_config, weights, score_thresh=0.0)(path)
    some = Predictor(tiny_config, weights, score_thresh=0.4)(path)
    assert 0 < len(some) < len(everything)
    assert some.scores.equal(everything.scores[: len(some)])
    assert everything.scores[len(some)] < 0.4
    assert Predictor(tiny_config, weights)(path).scores.equal(everything.scores[everything.scores >= 0.5])
    opts = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.4]
    for config in (None, "config"):
        assert Predictor(tiny_config, weights, opts=opts, score_thresh=config)(path).scores.equal(some.scores)
    with pytest.raises(ValueError, match=r"MODEL\.RETINANET\.SCORE_THRESH_TEST is evaluation's .* 0\.5"):
        Predictor(tiny_config, weights, opts=opts)


@pytest.mark.parametrize("tile", [0, 48])
def test_a_score_equal_to_the_threshold_counts(tile, tiny_config, weights, tmp_path):
    """As evaluation counts for the threshold of the best F1, which is the score of a detection."""
    path = tmp_path / "shapes_test/0.png"
    everything = Predictor(tiny_config, weights, score_thresh=0.0, tile=tile, optimize=False)(path)
    least = everything.scores[10].item()
    (tmp_path / "evaluation.json").write_text(json.dumps({"overall": {"best_f1": {"score_thresh": least}}}))
    for given in (least, str(tmp_path / "evaluation.json"), tmp_path / "evaluation.json"):
        found = Predictor(tiny_config, weights, score_thresh=given, tile=tile, optimize=False)(path)
        assert found.scores.equal(everything.scores[: len(found)]) and found.scores[-1] == least


# Reading


def write_image(folder, kind):
    rng = np.random.default_rng(0)
    path = str(folder / f"{kind}.{'jpg' if kind in ('exif', 'cmyk') else 'png'}")
    pixels = rng.integers(0, 256, (40, 64, 4), dtype=np.uint8)
    match kind:
        case "grey":
            Image.fromarray(pixels[:, :, 0]).save(path)
        case "rgba":
            Image.fromarray(pixels).save(path)
        case "palette":
            Image.fromarray(pixels[:, :, :3]).convert("P").save(path)
        case "cmyk":
            Image.fromarray(pixels[:, :, :3]).convert("CMYK").save(path)
        case "16-bit":
            Image.fromarray(rng.integers(0, 2**16, (40, 64), dtype=np.uint16)).save(path)
        case "exif":
            exif = Image.Exif()
            exif[274] = 6  # turned by 90 degrees
            Image.fromarray(pixels[:, :, :3]).save(path, exif=exif)
    return path


@pytest.fixture
def predictor(tiny_config, weights):
    return Predictor(tiny_config, weights, optimize=False, score_thresh=None)


def test_files_of_all_kinds_are_read_as_training_reads_them(predictor, tmp_path):
    for kind in ("grey", "rgba", "palette", "cmyk", "exif"):
        path = write_image(tmp_path, kind)
        image = predictor.read(path)
        np.testing.assert_array_equal(image, detection_utils.read_image(path, "BGR"))
        found = predictor(path)
        assert found.image_size == image.shape[:2] == ((64, 40) if kind == "exif" else (40, 64))
        assert_same(found, predictor(image))


def test_more_than_8_bits_are_refused_as_in_training(predictor, tmp_path):
    """Pillow would make all values above 255 white."""
    path = write_image(tmp_path, "16-bit")
    with pytest.raises(DataError) as training:
        FocalDatasetMapper(predictor.cfg, is_train=False)({"file_name": path})
    with pytest.raises(ImageError, match="Save it as 8 bits") as prediction:
        predictor(path)
    assert str(training.value) == str(prediction.value)


def test_what_is_no_image_is_refused_by_name(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    whole = (tmp_path / "shapes_test/0.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.jpg", "half.png", "empty.png"):
        with pytest.raises(ImageError, match=name):
            predictor(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        predictor(tmp_path / "none.png")
    with pytest.raises(ImageError, match="shapes_test"):
        predictor(tmp_path / "shapes_test")


def test_other_arrays_are_refused(predictor):
    for shape, dtype in [
        ((8, 8), np.uint8),
        ((8, 8, 4), np.uint8),
        ((3, 8, 8), np.uint8),
        ((8, 8, 3), np.float32),
        ((8, 8, 3), np.uint16),
        ((0, 8, 3), np.uint8),
    ]:
        with pytest.raises(ValueError, match=re.escape(f"{np.dtype(dtype)} and shape {shape}")):
            predictor(np.zeros(shape, dtype))
    whole = np.zeros((8, 8, 3), np.uint8)
    for image in (None, Image.fromarray(whole), [None], [torch.zeros(8, 8, 3)]):  # cv2.imread has None for no image
        with pytest.raises(TypeError, match=r"(NoneType|Image|Tensor); expected a path or .* uint8"):
            predictor(image)


def test_images_of_any_size_are_read_for_tiles(tiny_config, weights, tmp_path, monkeypatch):
    path = tmp_path / "survey.png"
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"survey\.png.*With tile \(--tile\)"):
        Predictor(tiny_config, weights).read(path)
    np.testing.assert_array_equal(Predictor(tiny_config, weights, tile=64).read(path), pixels)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_an_image_too_narrow_to_be_resized_is_refused(predictor):
    with pytest.raises(ImageError, match=r"4000 × 1 pixels.*INPUT\.MAX_SIZE_TEST 1333"):
        predictor(np.zeros((1, 4000, 3), np.uint8))


# Tiles


class BrightSpots(torch.nn.Module):
    """Finds the box around each connected bright region, and notes the sizes of the images."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batched_inputs):
        outputs = []
        for inputs in batched_inputs:
            image = (inputs["image"][0].numpy() > 127).astype(np.uint8)
            self.seen.append(image.shape)
            _, _, stats, _ = cv2.connectedComponentsWithStats(image)
            x, y, w, h, _ = stats[1:].T.astype(np.float32)
            scale = inputs["width"] / image.shape[1], inputs["height"] / image.shape[0]
            boxes = torch.from_numpy(np.stack([x, y, x + w, y + h], axis=1).reshape(-1, 4) * np.float32(scale * 2))
            found = Instances((inputs["height"], inputs["width"]), pred_boxes=Boxes(boxes))
            found.scores, found.pred_classes = (
                torch.full((len(boxes),), 0.9),
                torch.zeros(len(boxes), dtype=torch.int64),
            )
            outputs.append({"instances": found})
        return outputs


SPOTS = [[4, 6, 20, 30], [50, 10, 75, 30], [90, 40, 100, 120], [150, 60, 290, 110]]  # the last is wider than two tiles


def spotted(height=150, width=300):
    image = np.zeros((height, width, 3), np.uint8)
    for x0, y0, x1, y1 in SPOTS:
        image[y0:y1, x0:x1] = 255
    return image


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tiles_find_small_and_large_objects_once(batch_size, tiny_config, weights):
    opts = ["INPUT.MIN_SIZE_TEST", 0]
    predictor = Predictor(tiny_config, weights, opts=opts, tile=64, overlap=16, batch_size=batch_size)
    predictor.model = BrightSpots()
    found = predictor(spotted())
    assert sorted(found.pred_boxes.tensor.int().tolist()) == sorted(SPOTS)
    assert found.image_size == (150, 300)
    assert set(predictor.model.seen) == {(64, 64)} and len(predictor.model.seen) == 3 * 6


def test_the_image_as_a_whole_is_seen_too_where_images_are_resized(tiny_config, weights):
    predictor = Predictor(tiny_config, weights, opts=["INPUT.MIN_SIZE_TEST", 75], tile=100)
    predictor.model = BrightSpots()
    found = predictor(spotted())
    assert predictor.model.seen == [(75, 75)] * 8 + [(75, 150)]
    assert len(found) == len(SPOTS)
    rows = torch.tensor(sorted(found.pred_boxes.tensor.tolist()))
    torch.testing.assert_close(rows, torch.tensor(sorted(SPOTS)).float(), rtol=0, atol=2.5)


def test_tiles_alone(tiny_config, weights):
    opts = ["INPUT.MIN_SIZE_TEST", 75]
    predictor = Predictor(tiny_config, weights, opts=opts, tile=100, whole_image=False)
    predictor.model = BrightSpots()
    predictor(spotted())
    assert predictor.model.seen == [(75, 75)] * 8


def test_an_image_no_larger_than_a_tile_is_no_tile(tiny_config, weights, tmp_path):
    path = tmp_path / "shapes_test/0.png"
    plain = Predictor(tiny_config, weights, optimize=False, score_thresh=None)(path)
    assert_same(Predictor(tiny_config, weights, optimize=False, tile=64, score_thresh=None)(path), plain)
    assert_same(Predictor(tiny_config, weights, optimize=False, tile=1000, overlap=0, score_thresh=None)(path), plain)


def test_tiles_and_augmentation_together(tiny_config, weights, tmp_path):
    opts = ["TEST.AUG.MIN_SIZES", (32, 64)]
    predictor = Predictor(tiny_config, weights, opts=opts, tile=48, tta=True, batch_size=4)
    found = predictor(tmp_path / "shapes_test/0.png")
    assert len(found) > 10
    assert (found.pred_boxes.tensor >= 0).all() and (found.pred_boxes.tensor <= 64).all()


# Configs, weights, classes


def test_classes_go_by_their_names_where_they_are_known(tiny_config, tmp_path):
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    metadata = class_metadata(cfg, model)
    assert (metadata.name, metadata.thing_classes) == ("shapes_test", ["square", "disc"])
    for name in ("shapes_train", "shapes_test"):  # as in a new process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_local_datasets(cfg)
    (tmp_path / "shapes_test.json").unlink()  # on a machine without the test set
    metadata = class_metadata(cfg, model)
    assert (metadata.name, metadata.thing_classes) == ("shapes_train", ["square", "disc"])
    cfg.DATASETS.TRAIN = ("another",)
    assert class_metadata(cfg, model).get("thing_classes") is None
    cfg.DATASETS.TEST = ("coco_2017_val",)
    with pytest.raises(ValueError, match=r"2 classes.*coco_2017_val.* 80"):
        class_metadata(cfg, model)


def test_the_classes_of_a_config_are_known_without_its_data(tiny_config, tmp_path):
    """As where a model serves: the ids of a COCO file are not known there, the names are."""
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    entry = {"format": "coco", "json": "gone.json", "images": "gone"}
    cfg.DATASETS.LOCAL = [{"name": "gone", **entry}, {"name": "named", **entry, "classes": ["disc", "square"]}]
    register_local_datasets(cfg)
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("gone",), ("named",)
    assert class_metadata(cfg, model).thing_classes == ["disc", "square"]
    cfg.DATASETS.TRAIN = ("named", "shapes_train")  # a set that can be read has the ids too
    assert class_metadata(cfg, model).name == "shapes_train"
    model.num_classes = 3
    cfg.DATASETS.TRAIN = ("named",)
    with pytest.raises(ValueError, match="3 classes, but 'named' of the config's DATASETS has 2"):
        class_metadata(cfg, model)
    for name in ("gone", "named"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_the_callers_config_stays_as_it_is(tiny_config, weights):
    cfg = load_config(tiny_config, ["MODEL.DEVICE", "cpu"])
    before = cfg.dump()
    cfg.freeze()
    predictor = Predictor(cfg, weights, score_thresh=0.5, tta=True)
    assert cfg.dump() == before and cfg.is_frozen()
    assert weights == predictor.cfg.MODEL.WEIGHTS


def test_a_config_node_serves_as_well_as_its_file(tiny_config, weights, tmp_path):
    """In a new process its data sets are not registered, and the frequencies of its classes not counted."""
    opts = ["MODEL.DEVICE", "cpu", "MODEL.FOCAL.BIAS_INIT.NAME", "ClassFrequencyBiasInit"]
    cfg = get_cfg()
    add_focal_config(cfg)
    merge_from_file(cfg, tiny_config)
    cfg.merge_from_list(opts)
    path = tmp_path / "shapes_test/0.png"
    found = Predictor(cfg, weights, optimize=False, score_thresh=None)
    assert found.metadata.thing_classes == ["square", "disc"] and len(found.cfg.MODEL.FOCAL.CLASS_FREQUENCIES) == 2
    assert_same(found(path), Predictor(tiny_config, weights, opts=opts, optimize=False, score_thresh=None)(path))


def test_weights_that_are_not_the_models_are_refused(tiny_config, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="--weights"):
        Predictor(tiny_config)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        Predictor(tiny_config, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match=r"(?s)weights.pth.*head.cls_score.weight is \(12,.*\), expected \(18,"):
        Predictor(tiny_config, weights, opts=["MODEL.RETINANET.NUM_CLASSES", 3])
    content = torch.load(weights)["model"]
    backbone = {name: value for name, value in content.items() if name.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "backbone.pth")
    with pytest.raises(WeightsError, match=r"(?s)backbone.pth.*head.\S+ is missing.*more"):
        Predictor(tiny_config, tmp_path / "backbone.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(WeightsError, match=r"text\.pth"):
        Predictor(tiny_config, tmp_path / "text.pth")
    torch.save({"meta": {"epoch": 12}, "state_dict": content}, tmp_path / "mmdetection.pth")
    with pytest.raises(WeightsError, match=r"mmdetection\.pth.*focal_plugin convert"):
        Predictor(tiny_config, tmp_path / "mmdetection.pth")
    without = {name: value for name, value in content.items() if not name.startswith("normalizer")}
    assert len(without) < len(content)  # Detectron2's checkpoints have no running normaliser
    torch.save({"model": without}, tmp_path / "detectron2.pth")
    Predictor(tiny_config, tmp_path / "detectron2.pth")


@pytest.mark.parametrize(
    "larger, found",
    [
        (["MODEL.RETINANET.NUM_CONVS", 2], r"head\.cls_subnet\.2\.weight"),
        (["MODEL.RESNETS.DEPTH", 34], r"backbone\.bottom_up\.res2\.2\.\S+"),
    ],
)
def test_weights_of_a_larger_model_are_refused(larger, found, tiny_config, tmp_path):
    """All of the smaller model's are among them, and it would detect something."""
    state = build_model(load_config(tiny_config, ["MODEL.DEVICE", "cpu", *larger])).state_dict()
    torch.save({"model": state}, tmp_path / "large.pth")
    with pytest.raises(WeightsError, match=f"(?s)large.pth.*{found} is of no part of the model"):
        Predictor(tiny_config, tmp_path / "large.pth")


def test_more_weights_than_the_network_has_do_no_harm(tiny_config, weights, tmp_path):
    content = torch.load(weights)["model"]
    names = ["backbone.bottom_up.stem.conv1.norm.num_batches_tracked", "pixel_mean", "roi_heads.mask_head.weight"]
    torch.save({"model": content | {name: torch.zeros(3) for name in names}}, tmp_path / "more.pth")
    Predictor(tiny_config, tmp_path / "more.pth")


def test_a_config_without_a_name_is_refused(weights):
    with pytest.raises(ValueError, match="config is an empty path"):
        Predictor("", weights)


@pytest.mark.parametrize(
    "options, found",
    [
        ({"score_thresh": 1.5}, "score_thresh is 1.5"),
        ({"tile": -1}, "tile is -1"),
        ({"tile": 64, "overlap": 64}, "overlap 64"),
        ({"tile": 64, "overlap": -1}, "overlap -1"),
        ({"overlap": 8}, "tile is 0 and overlap 8"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_options_out_of_range_are_refused(options, found, tiny_config):
    with pytest.raises(ValueError, match=found):
        Predictor(tiny_config, "weights.pth", **options)


def test_lazy_configs_are_refused(weights):
    with pytest.raises(ValueError, match=r"model\.py is a LazyConfig"):
        Predictor("model.py", weights)


@pytest.mark.parametrize("name", ["ProposalNetwork", "SemanticSegmentor"])
def test_models_without_instances_are_refused(name, tiny_config, weights):
    with pytest.raises(ValueError, match=f"META_ARCHITECTURE is {name}"):
        Predictor(tiny_config, weights, opts=["MODEL.META_ARCHITECTURE", name])
