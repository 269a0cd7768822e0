"""Replicas that train alone for many steps and meet now and then: EDiT, DiLoCo, local SGD; their parts."""
