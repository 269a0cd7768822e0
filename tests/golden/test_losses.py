"""Twenty losses of a toy run in float64: a change that should change no number changes none."""

from hardy.config import from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.train.config import TrainConfig
from hardy.train.device import choose_hardware
from hardy.train.loop import Progress, run_loop
from hardy.train.setup import assemble


def test_twenty_losses_of_a_toy_run(golden, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    changes = {
        "model.shape": shape,
        "data.source": "synthetic:lognormal,documents=120,mean=40",
        "data.pack_tokens": 32,
        "optim.lr": 0.01,
        "train": {
            "steps": 20,
            "batch_packs": 4,
            "micro_packs": 2,
            "device": "cpu",
            "evaluate_every_steps": 10,
        },
    }
    config = from_dict(TrainConfig, override(to_dict(TrainConfig()), changes))
    corpus = prepare(config.data, cache_dir=tmp_path)
    assembly = assemble(config, Alone(), corpus=corpus, hardware=choose_hardware("cpu", "fp32"))
    assembly.worker.model.double()
    records = []
    run_loop(
        assembly.worker,
        assembly.plan,
        Progress(),
        save=lambda _: None,
        record=records.append,
        stop=lambda: False,
    )
    # Six digits: the loss is summed in fp32 whatever the weights are.
    golden("losses_toy", [float(f"{record['loss']:.6g}") for record in records])
