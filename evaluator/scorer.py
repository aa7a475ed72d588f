"""From pixels to a score in one pass: network, whitening tables, upsampling, blur, maximum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from evaluator.networks import Network
from evaluator.padim import enlargement
from evaluator.protocols import Protocol
from evaluator.whitening import Tables, Tree


class Scorer(nn.Module):
    """Photographs float32 [images, 3, size, size] in [0, 1] -> maps [images, size, size], scores.

    The score of a photograph is the largest pixel of its map; both are distances without unit.
    """

    centre: torch.Tensor
    spread: torch.Tensor
    node: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(
        self,
        network: Network,
        dims: Sequence[Sequence[int]],
        tree: Tree,
        tables: Sequence[Tables],
        protocol: Protocol,
        dual: bool,
    ) -> None:
        super().__init__()
        self.extractor = network.extractor
        self.names = [network.layers[level.layer] for level in tree.levels]
        self.grid, self.dual = tree.grid, dual
        shape = (1, 3, 1, 1)
        self._constant("centre", torch.tensor(network.mean).view(shape))
        self._constant("spread", torch.tensor(network.std).view(shape))
        for k, (level, table) in enumerate(zip(tree.levels, tables, strict=True)):
            chosen = dims[level.layer]
            self._constant(f"chosen_{k}", torch.tensor(chosen))
            # [dims, cells]: as the network gives it
            self._constant(f"mean_{k}", table.mean.T.contiguous())
            self._constant(f"cell_{k}", torch.from_numpy(level.cell))
            self._constant(f"parent_{k}", torch.from_numpy(level.parent))
            self._constant(f"whiten_{k}", table.whiten)
            self._constant(f"carry_{k}", table.carry)
        self._constant("node", torch.from_numpy(tree.node_of_position))
        for name, cells in zip(("rows", "columns"), tree.grid, strict=True):
            self._constant(name, torch.from_numpy(enlargement(cells, protocol)).float())
        self.to(network.device)
        self.eval()

    def _constant(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps and scores; see the class."""
        normal = (images - self.centre) / self.spread
        outputs = self.extractor(normal.contiguous(memory_format=torch.channels_last))
        maps = self.maps([outputs[name] for name in self.names])
        return maps, maps.amax(dim=(1, 2))

    def maps(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps from features [images, channels, rows, columns] of the layers, coarsest first."""
        distance = self.squares(layers).sqrt()  # [nodes, images]
        grid = distance[self.node].T.reshape(-1, *self.grid)
        return self.rows @ grid @ self.columns.T

    def squares(self, layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Squared Mahalanobis distances [nodes of the last level, images]."""
        total = state = torch.empty(0)
        last = len(layers) - 1
        for k, layer in enumerate(layers):
            parent = getattr(self, f"parent_{k}")
            chosen = layer.index_select(1, getattr(self, f"chosen_{k}")).float().flatten(2)
            x = (chosen - getattr(self, f"mean_{k}")).permute(2, 1, 0)  # [cells, dims, images]
            x = x.index_select(0, getattr(self, f"cell_{k}"))
            if k:
                state = state.index_select(0, parent)
                total = total.index_select(0, parent)
            if self.dual:
                inputs = torch.cat([x, state], dim=1) if k else x
            else:
                inputs = state = torch.cat([state, x], dim=1) if k else x
            y = torch.bmm(getattr(self, f"whiten_{k}"), inputs)
            square = y.square().sum(dim=1)
            total = total + square if k else square
            if self.dual and k < last:
                led = torch.bmm(getattr(self, f"carry_{k}"), y)
                state = state + led if k else led
        return total
