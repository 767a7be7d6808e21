"""A regularizer of the weights, as docs/regularizers.md shows it: L2-SP (Li et al. 2018, https://arxiv.org/abs/1802.01483)."""

import os

from safetensors.torch import load_file, save_file

from trl_ema.adapters.names import trained_names
from trl_ema.regularizers.base import Regularizer
from trl_ema.sharding import whole_weights


class L2SP(Regularizer):
    """λ/2 · ‖θ − θ₀‖² over the trained parameters θ, which began as θ₀."""

    name = "l2_sp"

    def __init__(self, model, weight):
        self.model, self.weight = model, weight
        self.start = {}
        for name in trained_names(model):
            with whole_weights(model.get_parameter(name)) as (whole,):
                self.start[name] = whole.detach().float().cpu().clone()

    def penalty(self, step):
        parameters = [self.model.get_parameter(name) for name in self.start]
        with whole_weights(*parameters) as whole:
            pairs = zip(whole, self.start.values(), strict=True)
            return self.weight / 2 * sum((now.float() - start.to(now.device)).pow(2).sum() for now, start in pairs)

    def save(self, directory, *, writes=True, **origin):
        if writes:
            os.makedirs(directory, exist_ok=True)
            save_file(self.start, os.path.join(directory, "l2_sp.safetensors"))

    def check(self, directory, **origin):
        if not os.path.isfile(os.path.join(directory, "l2_sp.safetensors")):
            raise ValueError(f"{directory} has no l2_sp.safetensors")

    def load(self, directory):
        self.start = load_file(os.path.join(directory, "l2_sp.safetensors"))
