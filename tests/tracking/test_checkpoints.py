import torch

from longtail_experts.tracking.checkpoints import weights_of


def test_weights_once_taken_are_left_alone_by_the_training_that_goes_on():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    network = network.to(memory_format=torch.channels_last)
    taken = weights_of(network)
    before = {name: value.clone() for name, value in taken.items()}
    assert set(taken) == {n for n, v in network.state_dict().items() if v.is_floating_point()}
    assert all(value.is_contiguous() for value in taken.values())
    with torch.no_grad():
        for value in network.state_dict().values():
            value += 1
    assert all(torch.equal(taken[name], value) for name, value in before.items())
