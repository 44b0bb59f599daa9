"""Anchors by the number of scales per octave, as table 1c counts them."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator

from ..config import ConfigError


@ANCHOR_GENERATOR_REGISTRY.register()
class OctaveAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator with sizes s, s·2^(1/n), ..., s·2^((n − 1)/n) on each level (section 4).

    s is the first of the level's ``MODEL.ANCHOR_GENERATOR.SIZES`` and n is ``MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE``:
    one key sets how dense the scales are, independently of their range. A ConfigError for n below 1.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, object]:
        scales = cfg.MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE
        if scales < 1:
            raise ConfigError(f"MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE is {scales}; expected 1 or more.")
        arguments = super().from_config(cfg, input_shape)
        # Levels are an octave apart, s = 32 to 512, so n scales a level cover 32 to 512·2^((n − 1)/n) evenly. The paper
        # takes 3, times the ratios 1:2, 1:1 and 2:1; in table 1c 2 are as good and 1 is not.
        sizes = [[sizes[0] * 2 ** (k / scales) for k in range(scales)] for sizes in arguments["sizes"]]
        return arguments | {"sizes": sizes}
