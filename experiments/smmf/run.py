"""SMMF against AdamW and Adafactor on a small model, and its settings one by one; see README.md.

hardy reproduce smmf            # minutes on two cores
hardy reproduce smmf --smoke    # seconds, proves nothing but that it runs
"""

import sys
from functools import partial
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from claims import main  # noqa: E402  the path is set above
from optimizers import SMMF, TABLE  # noqa: E402
from small_model import Contest, OptimizerStudy  # noqa: E402

VARIANTS = {
    "smmf, whole model": partial(SMMF, embed_kind="smmf"),
    "smmf, momentum kept": partial(SMMF, embed_kind="smmf", growth_rate=1.0),
    "smmf, no momentum": partial(SMMF, embed_kind="smmf", beta1=None),
    "smmf, decay rate -0.5": partial(SMMF, embed_kind="smmf", decay_rate=-0.5),
    "smmf, updates clamped at 10": partial(SMMF, embed_kind="smmf", max_update=10.0),
}
NAMES = ["adamw", "adafactor", "smmf, embeddings by adamw", *VARIANTS]


CLAIMS = {
    "smmf_over_adamw_percent": ("smmf, whole model", "adamw"),
    "smmf_over_adafactor_percent": ("smmf, whole model", "adafactor"),
    "smmf_embeddings_percent": ("smmf, whole model", "smmf, embeddings by adamw"),
}
STUDY = OptimizerStudy(table=TABLE | VARIANTS, text=Contest(names=NAMES, claims=CLAIMS)).study(
    FOLDER, __doc__
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
