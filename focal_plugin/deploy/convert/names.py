"""The names of weights in other projects, and their names in Detectron2."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from .files import ConvertError

# A pattern for a whole name, and the name in Detectron2.
Rule = tuple[str, str | Callable[[re.Match], str]]

_PART = r"(weight|bias|running_mean|running_var)"
_ENDING = {"w": "weight", "b": "bias", "s": "weight"}  # of Detectron's blobs


def rename(weights: Mapping[str, Tensor], rules: Sequence[Rule], ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return the weights by Detectron2's names, without those whose whole name matches a pattern in ``ignored``.

    Raises:
        ConvertError: no rule matches a name, or two names become the same.
    """
    renamed, unknown = {}, []
    for name, tensor in weights.items():
        if any(re.fullmatch(pattern, name) for pattern in ignored):
            continue
        match, new = next(((m, new) for pattern, new in rules if (m := re.fullmatch(pattern, name))), (None, ""))
        if match is None:
            unknown.append(name)
            continue
        new = new(match) if callable(new) else match.expand(new)
        if new in renamed:
            raise ConvertError(f"{name} and another name in the file both become {new}.")
        renamed[new] = tensor
    if unknown:
        raise ConvertError(
            f"{len(unknown)} of the {len(weights)} weights are of no known part of this architecture:\n  "
            + "\n  ".join(unknown)
        )
    return renamed


def resnet_rules(theirs: str = "", ours: str = "") -> list[Rule]:
    """Return the rules for a ResNet of torchvision, timm or MMDetection, with prefixes ``theirs`` and ``ours``."""
    theirs = re.escape(theirs)
    block = rf"{theirs}layer([1-4])\.(\d+)\."
    return [
        (rf"{theirs}conv1\.weight", rf"{ours}stem.conv1.weight"),
        (rf"{theirs}bn1\.{_PART}", rf"{ours}stem.conv1.norm.\1"),
        (rf"{block}conv([123])\.weight", lambda m: f"{ours}res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.weight"),
        (rf"{block}bn([123])\.{_PART}", lambda m: f"{ours}res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}"),
        (rf"{block}downsample\.0\.weight", lambda m: f"{ours}res{int(m[1]) + 1}.{m[2]}.shortcut.weight"),
        (rf"{block}downsample\.1\.{_PART}", lambda m: f"{ours}res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}"),
    ]


BOTTOM_UP = "backbone.bottom_up."
COUNTERS = (r".*\.num_batches_tracked",)  # of batch norm, read only in training without momentum
CLASSIFIER = (r"fc\.(weight|bias)",)  # of ImageNet

_SUBNETS = {"classification_head": "cls", "regression_head": "bbox", "cls_convs": "cls", "reg_convs": "bbox"}


def _layer(kind: str, conv: int, layers: int, part: str, is_norm: bool = False) -> str:
    """The name of a subnet's weights. ``layers`` is the number of layers for each convolution: 2, or 3 with a norm."""
    return f"head.{_SUBNETS.get(kind, kind)}_subnet.{conv * layers + is_norm}.{part}"


def _subnet_rules(conv: str, norm: str, layers: int) -> list[Rule]:
    """The rules for the subnets' convolutions and norms; the patterns' groups are the subnet and the conv's number."""
    return [
        (rf"{conv}(weight|bias)", lambda m: _layer(m[1], int(m[2]), layers, m[3])),
        (rf"{norm}(weight|bias)", lambda m: _layer(m[1], int(m[2]), layers, m[3], is_norm=True)),
    ]


def torchvision_rules(has_norm: bool) -> list[Rule]:
    """Return the rules for torchvision's ``RetinaNet`` on a ResNet; ``has_norm``: the subnets have norms (v2)."""
    layers = 3 if has_norm else 2
    conv = r"head\.(classification_head|regression_head)\.conv\.(\d+)\."
    return [
        *resnet_rules("backbone.body.", BOTTOM_UP),
        # Before 0.14, these had no ".0", and the numbers of the subnets' convolutions counted the ReLUs, too.
        (r"backbone\.fpn\.inner_blocks\.([012])(?:\.0)?\.(weight|bias)", _level("backbone.fpn_lateral")),
        (r"backbone\.fpn\.layer_blocks\.([012])(?:\.0)?\.(weight|bias)", _level("backbone.fpn_output")),
        (r"backbone\.fpn\.extra_blocks\.(p6|p7)\.(weight|bias)", r"backbone.top_block.\1.\2"),
        *_subnet_rules(rf"{conv}0\.", rf"{conv}1\.", layers),
        (rf"{conv}(weight|bias)", lambda m: _layer(m[1], int(m[2]) // 2, layers, m[3])),
        (r"head\.classification_head\.cls_logits\.(weight|bias)", r"head.cls_score.\1"),
        (r"head\.regression_head\.bbox_reg\.(weight|bias)", r"head.bbox_pred.\1"),
    ]


def mmdetection_rules(has_norm: bool) -> list[Rule]:
    """Return the rules for MMDetection's ``RetinaNet`` on a ``ResNet``; ``has_norm``: the head has group norms."""
    layers = 3 if has_norm else 2
    conv = r"bbox_head\.(cls_convs|reg_convs)\.(\d+)\."
    return [
        *resnet_rules("backbone.", BOTTOM_UP),
        (r"neck\.lateral_convs\.([012])\.conv\.(weight|bias)", _level("backbone.fpn_lateral")),
        (r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)", _level("backbone.fpn_output")),
        (r"neck\.fpn_convs\.([34])\.conv\.(weight|bias)", lambda m: f"backbone.top_block.p{int(m[1]) + 3}.{m[2]}"),
        *_subnet_rules(rf"{conv}conv\.", rf"{conv}gn\.", layers),
        (r"bbox_head\.retina_cls\.(weight|bias)", r"head.cls_score.\1"),
        (r"bbox_head\.retina_reg\.(weight|bias)", r"head.bbox_pred.\1"),
    ]


def _level(name: str) -> Callable[[re.Match], str]:
    return lambda m: f"{name}{int(m[1]) + 3}.{m[2]}"


def _detectron1_conv(m: re.Match) -> str:
    stage, block, branch, norm, ending = m.groups()
    conv = "shortcut" if branch == "1" else f"conv{'abc'.index(branch[1]) + 1}"
    return f"{BOTTOM_UP}res{stage}.{block}.{conv}.{'norm.' if norm else ''}{_ENDING[ending]}"


DETECTRON1_RULES: list[Rule] = [
    (r"conv1_w", rf"{BOTTOM_UP}stem.conv1.weight"),
    (r"res_conv1_bn_([sb])", lambda m: f"{BOTTOM_UP}stem.conv1.norm.{_ENDING[m[1]]}"),
    (r"res([2-5])_(\d+)_branch(1|2[abc])(_bn)?_([wbs])", _detectron1_conv),
    (r"fpn_inner_res([345])_\d+_sum(?:_lateral)?_([wb])", lambda m: f"backbone.fpn_lateral{m[1]}.{_ENDING[m[2]]}"),
    (r"fpn_res([345])_\d+_sum_([wb])", lambda m: f"backbone.fpn_output{m[1]}.{_ENDING[m[2]]}"),
    (r"fpn_([67])_([wb])", lambda m: f"backbone.top_block.p{m[1]}.{_ENDING[m[2]]}"),
    (r"retnet_(cls|bbox)_conv_n(\d+)_fpn3_([wb])", lambda m: _layer(m[1], int(m[2]), 2, _ENDING[m[3]])),
    (r"retnet_cls_pred_fpn3_([wb])", lambda m: f"head.cls_score.{_ENDING[m[1]]}"),
    (r"retnet_bbox_pred_fpn3_([wb])", lambda m: f"head.bbox_pred.{_ENDING[m[1]]}"),
]
# Leftovers of the ImageNet model and of the solver.
DETECTRON1_IGNORED = (r"__preserve__/.*", r"(fc1000|pred)_[wb]", r"conv1_b", r"lr")
