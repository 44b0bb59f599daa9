import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_plugin import ConfigError, add_focal_config
from focal_plugin.data import check_num_classes, register_local_dataset


def make_cfg(train=("train",), test=("test",), **model):
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = model.get("arch", "FocalRetinaNet")
    cfg.MODEL.RETINANET.NUM_CLASSES = model.get("retinanet", 80)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = model.get("roi_heads", 80)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    return cfg


@pytest.fixture
def sets():
    def register(**classes):
        for name, names in classes.items():
            DatasetCatalog.register(name, list)
            if names is not None:
                MetadataCatalog.get(name).thing_classes = names

    return register


@pytest.mark.parametrize("arch", ["FocalRetinaNet", "RetinaNet"])
def test_dense_detectors(sets, arch):
    sets(train=["a", "b"], test=["a", "b"])
    check_num_classes(make_cfg(arch=arch, retinanet=2))
    with pytest.raises(
        ValueError, match=r"MODEL\.RETINANET\.NUM_CLASSES is 80, but 'train' has 2 classes: a, b"
    ) as error:
        check_num_classes(make_cfg(arch=arch, roi_heads=2))
    assert "Set MODEL.RETINANET.NUM_CLASSES to 2" in str(error.value)


def test_two_stage_detectors(sets):
    sets(train=["a", "b"], test=["a", "b"])
    check_num_classes(make_cfg(arch="GeneralizedRCNN", roi_heads=2))
    with pytest.raises(ValueError, match=r"MODEL\.ROI_HEADS\.NUM_CLASSES is 80"):
        check_num_classes(make_cfg(arch="GeneralizedRCNN", retinanet=2))


def test_class_agnostic_model_has_no_number(sets):
    sets(train=["a", "b"], test=["a", "b"])
    check_num_classes(make_cfg(arch="ProposalNetwork"))


@pytest.mark.parametrize("others", [["a"], ["b", "a"], ["a", "c"]])
def test_train_and_test_disagree(sets, others):
    sets(train=["a", "b"], more=["a", "b"], test=others)
    with pytest.raises(ValueError, match="'train' has a, b, 'test' has " + ", ".join(others)):
        check_num_classes(make_cfg(train=("train", "more"), retinanet=2))


def test_test_sets_alone(sets):
    sets(test=["a", "b"])
    with pytest.raises(ValueError, match="'test' has 2 classes"):
        check_num_classes(make_cfg(train=()))


def test_nothing_to_compare(sets):
    sets(train=None)
    check_num_classes(make_cfg(test=()))
    check_num_classes(make_cfg(train=(), test=()))


def test_a_model_that_is_not_registered(sets):
    sets(train=["a"])
    with pytest.raises(
        ConfigError, match=r"MODEL\.META_ARCHITECTURE is 'FocalNet'.*FocalRetinaNet.*MODEL\.FOCAL\.IMPORTS"
    ):
        check_num_classes(make_cfg(arch="FocalNet", test=()))


def test_unregistered():
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST names 'nowhere'.*DATASETS\.LOCAL"):
        check_num_classes(make_cfg(train=(), test=("nowhere",)))


def test_long_lists_are_cut(sets):
    sets(train=[f"c{i}" for i in range(20)])
    with pytest.raises(ValueError, match=r"c9, … \(20 in all\)"):
        check_num_classes(make_cfg(test=()))


def test_local_sets_are_loaded_for_their_names(coco_file):
    coco_file.image(1)
    coco_file.box(1)
    paths = {"json": str(coco_file.write()), "images": str(coco_file.folder / "images")}
    register_local_dataset({"name": "train", "format": "coco", **paths})
    with pytest.raises(ValueError, match="'train' has 1 classes: cat"):
        check_num_classes(make_cfg(test=()))
    check_num_classes(make_cfg(test=(), retinanet=1))


def test_builtin_sets_need_no_files():
    check_num_classes(make_cfg(train=("coco_2017_train",), test=("coco_2017_val",)))
