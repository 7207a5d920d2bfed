"""What the published UniVLA checkpoints do not say about themselves, for ``univla_jax.convert``.

    python -m univla_jax.convert --from_hf=Emu3-VisionTokenizer --to=VISION
    python -m univla_jax.convert --from_hf=UNIVLA_LIBERO_VIDEO_BS192_8K --to=POLICY \\
        --config=configs/official.py:libero_video --config.text=Emu3-Stage1 \\
        --config.vision=VISION --config.action=FAST

Camera sizes, tasks and sequence lengths are those of the reference's recipes (UniVLA
scripts/simulator/*); frames below 512 x 512 keep their size because its evaluation lowers
``min_pixels`` to 80 x 80. Action statistics: UniVLA configs/normalizer_{libero,calvin,bridge}.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from univla_jax.config import complete
from univla_jax.errors import UserError
from univla_jax.interop.hf_assets import ConvertConfig

LIBERO = {
    "mean": (
        0.06278176605701447,
        0.08684149384498596,
        -0.09037397801876068,
        0.0005407411954365671,
        0.005643357057124376,
        -0.005229220259934664,
        -0.0496407225728035,
    ),
    "std": (
        0.33550307154655457,
        0.37842780351638794,
        0.44471776485443115,
        0.03924243152141571,
        0.06339304149150848,
        0.07796675711870193,
        0.9987671375274658,
    ),
    "q01": (
        -0.7046250000751599,
        -0.80100000008544,
        -0.9375000001,
        -0.11467779149968735,
        -0.16395000004372,
        -0.2240490058320433,
        -1.0000000001,
    ),
    "q99": (
        0.93712500009996,
        0.86775000009256,
        0.93712500009996,
        0.13175314309916836,
        0.19275000005139997,
        0.3353504997073735,
        0.9996000000999599,
    ),
}
CALVIN = {
    "mean": (
        0.0005293599431385171,
        0.010146231957300664,
        -0.006517528965541374,
        -0.0024581778407627647,
        0.000535014011274101,
        -0.004482420546843006,
        -0.07994402295869955,
    ),
    "std": (
        0.24872558886755747,
        0.20490066361434578,
        0.21329531799118245,
        0.157341273111141,
        0.1714982028412135,
        0.35212838130971896,
        0.99679935453088,
    ),
    "q01": (
        -0.69960000006996,
        -0.57760000005776,
        -0.4336000000433601,
        -0.42320000004232006,
        -0.46520000004652007,
        -1.0000000001,
        -1.0000000001,
    ),
    "q99": (
        0.67640000006764,
        0.5560000000555998,
        0.5944000000594398,
        0.42640000004264,
        0.41200000004119985,
        0.9996000000999599,
        0.9996000000999599,
    ),
}
BRIDGE = {
    "mean": (
        0.00022990013530943543,
        0.0001223820581799373,
        -0.00012801054981537163,
        -0.00015581517072860152,
        -0.00040400627767667174,
        0.0002303723740624264,
        0.575043797492981,
    ),
    "std": (
        0.009764148853719234,
        0.013682912103831768,
        0.012667506001889706,
        0.02853561006486416,
        0.03064056858420372,
        0.07689429819583893,
        0.49150383472442627,
    ),
    "q01": (
        -0.02887803485105428,
        -0.04178320091122349,
        -0.026113155505000457,
        -0.08117201867235568,
        -0.09309056401752747,
        -0.20778717060421048,
        -1e-10,
    ),
    "q99": (
        0.02819482065335177,
        0.04079562563528227,
        0.04015785568112329,
        0.08070396399877966,
        0.07745134926258301,
        0.2016542930635028,
        0.99980000009996,
    ),
}

_VIDEO = {"task": "policy_video", "frames": 2}
_IMAGE = {"task": "policy_image", "frames": 1}
_LIBERO = {
    "corpus": "libero",
    "control_hz": 20.0,
    "chunk_size": 10,
    "views": {"image": {"size": (200, 200)}, "wrist_image": {"size": (200, 200)}},
    "statistics": LIBERO,
}

RECIPES = {
    "base": {},
    "world_model": {
        "corpus": "bridge",
        "task": "world_model",
        "frames": 6,
        "frame_spacing": 5,
        "control_hz": 5.0,
        "sequence_length": 6400,
        "views": {"image": {"size": (256, 256)}},
    },
    "libero_video": {**_LIBERO, **_VIDEO, "sequence_length": 3200},
    "libero_image": {**_LIBERO, **_IMAGE, "sequence_length": 1600},
    "calvin_video": {
        **_VIDEO,
        "corpus": "calvin",
        "control_hz": 30.0,
        "chunk_size": 10,
        "sequence_length": 1700,
        "views": {"image": {"size": (200, 200)}, "wrist_image": {"size": (80, 80)}},
        "statistics": CALVIN,
    },
    "bridge_video": {
        **_VIDEO,
        "corpus": "bridge",
        "control_hz": 5.0,
        "chunk_size": 5,
        "frame_spacing": 5,
        "sequence_length": 2400,
        "views": {"image": {"size": (256, 256)}},
        "statistics": BRIDGE,
    },
}


def get_config(recipe: str = "base") -> ConfigDict:
    """The settings of one published checkpoint; ``base`` has none.

    Raises:
      UserError: no such recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"config recipe {recipe!r}; name one after a colon: {', '.join(RECIPES)}")
    return complete(ConvertConfig, RECIPES[recipe])
