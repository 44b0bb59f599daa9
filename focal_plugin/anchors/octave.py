"""Anchors by their number of scales an octave, as table 1c counts them."""

from detectron2.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator


@ANCHOR_GENERATOR_REGISTRY.register()
class OctaveAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchor generator with sizes s, s·2^(1/n), ..., s·2^((n − 1)/n) on each level (section 4).

    s is the first of the level's ``MODEL.ANCHOR_GENERATOR.SIZES`` and n is ``MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE``:
    one key changes how dense the scales are, whatever their range. In Python, ``DefaultAnchorGenerator`` does the same
    with these sizes.

    Raises:
        ValueError: n is not above 0.
    """

    @classmethod
    def from_config(cls, cfg, input_shape):
        scales = cfg.MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE
        if scales < 1:
            raise ValueError(f"MODEL.FOCAL.ANCHORS.SCALES_PER_OCTAVE is {scales}; expected 1 or more.")
        arguments = super().from_config(cfg, input_shape)
        return arguments | {
            "sizes": [[sizes[0] * 2 ** (k / scales) for k in range(scales)] for sizes in arguments["sizes"]]
        }
