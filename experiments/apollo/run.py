"""APOLLO and APOLLO-Mini against AdamW, SGD, Adafactor and GaLore on a small model; see README.md.

python experiments/apollo/run.py            # minutes on two cores
python experiments/apollo/run.py --smoke    # seconds, proves nothing but that it runs
"""

import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from optimizers import APOLLO, MINI, TABLE  # noqa: E402  the path is set above
from small_model import main, page  # noqa: E402

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


ZEROED = {
    "adamw, zero outputs": zero_outputs(TABLE["adamw"]),
    "apollo, zero outputs": zero_outputs(APOLLO),
    "apollo-mini, zero outputs": zero_outputs(MINI),
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
page = partial(page, FOLDER)


if __name__ == "__main__":
    table = TABLE | ZEROED
    sys.exit(main(FOLDER, __doc__, table=table, names=NAMES, claims=CLAIMS, at_rate_of=AT_RATE_OF))
