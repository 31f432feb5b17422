"""What candidates have in common that learn a whole network, not only what follows a frozen one."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from inference.evidence import EvidenceNet
from inference.heatmap import grad_cam
from inference.manifest import EvidenceSpec
from weights.recipe.bank import Pictures
from weights.recipe.candidates.candidate import Explanation, Floats, Maps, Rows, Weights
from weights.recipe.network import empty_evidence, round_convolutions

_BATCH = 32


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """Networks of one shape on one set of pictures."""

    pictures: Pictures
    architecture: str
    spec: EvidenceSpec
    device: str

    def drawn(self, labels: int, seed: int) -> EvidenceNet:
        """Untrained; its outputs are the labels."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return empty_evidence(self.architecture, self.spec, labels=labels, outputs=labels)

    def placed(self, network: EvidenceNet) -> EvidenceNet:
        """On the device, in the order of memory that is fast there."""
        return network.to(self.device).to(memory_format=torch.channels_last)

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """(n, size, size), 0..1 of the value range -> what the network takes, on its device."""
        made = self.pictures.as_input(images)
        return made.to(self.device, memory_format=torch.channels_last)

    def kept(self, network: EvidenceNet) -> Weights:
        """As they are stored: rounded, in place."""
        round_convolutions(network.backbone)
        return {name: value.cpu().numpy().copy() for name, value in network.state_dict().items()}

    def network(self, weights: Weights, mix: NDArray[np.float64]) -> EvidenceNet:
        """As it is served; `mix` (outputs, labels)."""
        outputs, labels = mix.shape
        network = empty_evidence(self.architecture, self.spec, labels=labels, outputs=outputs)
        mixed = {"mix.weight": mix.astype(np.float32), "mix.bias": np.zeros(outputs, np.float32)}
        values = {**weights, **mixed}
        network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
        return network.eval().requires_grad_(False)

    def maps(self, weights: Weights, rows: Rows, how: Explanation) -> Maps:
        """(n, h, w): raw heat maps of the first label."""
        network = self.network(weights, np.eye(weights["mix.weight"].shape[1]))
        inputs = self.pictures.as_input(self.pictures.unit(rows)).numpy()
        return grad_cam(network, how.layer, inputs, [{0: 1.0}] * len(rows), how.method)

    @torch.inference_mode()
    def logits(self, network: EvidenceNet, learnt: Rows, shape: tuple[int, int]) -> Floats:
        """(slices, labels) of all but the slices it learnt from, which stay NaN; of all, if all."""
        unseen = np.setdiff1d(np.arange(shape[0]), learnt)
        asked = unseen if len(unseen) else np.arange(shape[0])
        network.eval()
        made = np.full(shape, np.nan)
        for start in range(0, len(asked), _BATCH):
            some = asked[start : start + _BATCH]
            features = network.features(self.inputs(self.pictures.unit(some)))
            made[some] = network.head(features).double().cpu().numpy()
        return made
