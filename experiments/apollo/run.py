"""APOLLO and APOLLO-Mini against AdamW, SGD, Adafactor and GaLore on a small model; see README.md.

hardy reproduce apollo            # minutes on two cores
hardy reproduce apollo --smoke    # seconds, proves nothing but that it runs
"""

import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from claims import main  # noqa: E402  the path is set above
from optimizers import APOLLO, MINI, TABLE  # noqa: E402
from small_model import Contest, OptimizerStudy  # noqa: E402

NAMES = [
    "adamw",
    "sgd",
    "adafactor",
    "galore",
    *(
        f"{name}, embeddings by {kind}"
        for name in ("apollo", "apollo-mini")
        for kind in ("adamw", "smmf", "apollo")
    ),
]
OUTPUTS = ("attention.output.weight", "feed_forward.down.weight")


def zero_outputs(make):
    """Return a maker that first sets the projections into the residual stream to zero."""

    def build(model, lr):
        outputs = [p for name, p in model.named_parameters() if name.endswith(OUTPUTS)]
        if not outputs:
            raise RuntimeError(f"the model has no parameter named {OUTPUTS}")
        for param in outputs:
            param.data.zero_()
        return make(model, lr)

    return build


RELEASED_EPS = partial(APOLLO, rules=[(r"(attention|feed_forward)\.", "apollo", {"eps": 1e-6})])
ZEROED = {
    "adamw, zero outputs": zero_outputs(TABLE["adamw"]),
    "apollo, zero outputs": zero_outputs(APOLLO),
    "apollo-mini, zero outputs": zero_outputs(MINI),
}
WITH_RELEASED_EPS = {
    "apollo, eps 1e-6": RELEASED_EPS,
    "apollo, zero outputs, eps 1e-6": zero_outputs(RELEASED_EPS),
}

AT_RATE_OF = {
    "adamw, zero outputs": "adamw",
    "apollo, zero outputs": "apollo, embeddings by adamw",
    "apollo-mini, zero outputs": "apollo-mini, embeddings by adamw",
}
CLAIMS = {
    "apollo_over_adamw_percent": ("apollo, embeddings by adamw", "adamw"),
    "mini_over_adamw_percent": ("apollo-mini, embeddings by adamw", "adamw"),
    "apollo_over_galore_percent": ("apollo, embeddings by adamw", "galore"),
    "apollo_zero_outputs_percent": ("apollo, zero outputs", "apollo, embeddings by adamw"),
    "mini_zero_outputs_percent": ("apollo-mini, zero outputs", "apollo-mini, embeddings by adamw"),
    "apollo_smmf_embeddings_percent": ("apollo, embeddings by smmf", "apollo, embeddings by adamw"),
    "mini_smmf_embeddings_percent": (
        "apollo-mini, embeddings by smmf",
        "apollo-mini, embeddings by adamw",
    ),
}
TEXT = Contest(names=NAMES, claims=CLAIMS, at_rate_of=AT_RATE_OF)
MARKOV = Contest(
    names=[name for name in NAMES if not name.endswith(("by smmf", "by apollo"))],
    claims={
        f"markov_{claim}": CLAIMS[claim]
        for claim in (
            "apollo_over_adamw_percent",
            "mini_over_adamw_percent",
            "apollo_zero_outputs_percent",
            "mini_zero_outputs_percent",
        )
    },
    at_rate_of=AT_RATE_OF | dict.fromkeys(WITH_RELEASED_EPS, "apollo, embeddings by adamw"),
)
STUDY = OptimizerStudy(table=TABLE | ZEROED | WITH_RELEASED_EPS, text=TEXT, markov=MARKOV).study(
    FOLDER, __doc__
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
