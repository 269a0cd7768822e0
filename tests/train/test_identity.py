"""What is said where a run goes on with another model, vocabulary, data or order than its checkpoint."""

import pytest

from hardy.config import UserError, from_dict, override, to_dict
from hardy.data.corpus import prepare
from hardy.distributed.comm import Alone
from hardy.train.device import choose_hardware
from hardy.train.identity import check_identity
from hardy.train.setup import assemble

HARDWARE = choose_hardware("cpu", "fp32")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"model.shape.num_layers": 3},
            r"the model changed .* \(model.shape.num_layers is 2 there and 3 here\)",
        ),
        (
            {"model.context_tokens": 4096},
            r"the model changed .* \(model.context_tokens is 2048 there and 4096 here\)",
        ),
        ({"model.name": "60m"}, r"the model changed .* \(model.name is '1m' there and '60m' here; "),
        ({"train.seed": 5}, r"the order of the data changed .* \(train.seed is 0 there and 5 here\)"),
        (
            {"balance.mode": "pack", "balance.delay_steps": 3},
            r"the order of the data changed .* \(balance.delay_steps is 0 there and 3 here\)",
        ),
        ({"data.validation_fraction": 0.4}, r"the data .* \(data.validation_fraction is 0.2 there and 0.4 "),
        (
            {"data.tokenizer": "bpe:300"},
            r"the vocabulary .* \(data.tokenizer is 'bytes' there and 'bpe:300' ",
        ),
        ({"strategy.name": "edit"}, r"the strategy .* \(strategy.name is 'synchronous' there and 'edit' "),
    ],
)
def test_resuming_another_run_is_refused(make_config, corpus, cache_dir, change, text):
    before = assemble(make_config(), Alone(), corpus=corpus, hardware=HARDWARE).identity
    config = from_dict(type(make_config()), override(to_dict(make_config()), change))
    now = assemble(
        config, Alone(), corpus=prepare(config.data, cache_dir=cache_dir), hardware=HARDWARE
    ).identity
    with pytest.raises(UserError, match=r"cannot resume some/run: " + text):
        check_identity(before, now, run_dir="some/run")
    check_identity(before, before, run_dir="some/run")


def test_resuming_levelled_batches_by_other_costs_is_refused(make_config, corpus):
    dotted = {"balance.mode": "pack", "balance.delay_steps": 3}
    found = []
    for recompute in ("nothing", "blocks"):
        changes = {**dotted, "model.recompute": recompute}
        config = from_dict(type(make_config()), override(to_dict(make_config()), changes))
        found.append(assemble(config, Alone(), corpus=corpus, hardware=HARDWARE).identity)
    text = r"\(balance.cost is '2,048 tokens take 3.59\d+ times 1,024' there and '2,048 tokens take 3.6"
    with pytest.raises(UserError, match=r"the order of the data changed .* " + text):
        check_identity(found[0], found[1], run_dir="some/run")
    check_identity(found[0], found[0], run_dir="some/run")


@pytest.mark.parametrize(
    ("part", "source", "text"),
    [
        (
            "data",
            "files:b",
            r"the data changed .* \(data.source is 'files:SOURCE' there and 'files:b' here\)",
        ),
        ("data", None, r"the data changed .* \(data.source=files:SOURCE holds something else now\)"),
        ("tokenizer", None, r"\(data.source=files:SOURCE or data.tokenizer=bytes holds something else now\)"),
    ],
)
def test_other_data_is_told_by_settings_and_not_by_hashes(
    make_config, corpus, text_folder, part, source, text
):
    before = assemble(make_config(), Alone(), corpus=corpus, hardware=HARDWARE).identity
    told = before["settings"]["data"] | ({} if source is None else {"data.source": source})
    now = before | {part: "0123abcd", "settings": before["settings"] | {"data": told}}
    with pytest.raises(UserError, match=text.replace("SOURCE", str(text_folder))) as caught:
        check_identity(before, now, run_dir="some/run")
    assert "0123abcd" not in str(caught.value)
    older = {key: value for key, value in before.items() if key != "settings"}  # without what is told
    with pytest.raises(UserError, match=f"data.source={source or ''}.* holds something else now"):
        check_identity(older, now, run_dir="some/run")
