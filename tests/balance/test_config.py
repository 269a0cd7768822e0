"""The settings of the room balance."""

import pytest

from hardy.balance.config import BalanceConfig
from hardy.balance.packing import PACKERS
from hardy.config import ConfigError, from_dict


@pytest.mark.parametrize("name", PACKERS)
def test_every_packer_can_be_chosen(name):
    assert from_dict(BalanceConfig, {"packing": name}).packing == name


def test_a_misspelled_packing_names_the_nearest():
    with pytest.raises(ConfigError, match="balance.packing must be one of stream, whole.*mean 'stream'"):
        BalanceConfig(packing="streem")
