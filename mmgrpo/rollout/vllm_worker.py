"""What is added to every vLLM worker: receive weights, and say which ones it holds.

vLLM mixes this class into its own worker (``worker_extension_cls``), in the trainer's process or in
a server's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mmgrpo.rollout.vllm_weights import ADAPTER_FILE, WEIGHTS_FILE, Stamp, digest, read_weights


class WeightReceiver:
    """Methods of a worker; every one answers with the worker's stamp as a dict.

    A stamp is set only after all weights were loaded and their digest was the expected one, and is
    empty from the moment a load begins: half a set of weights never has a stamp.
    """

    model_runner: Any
    reload_weights: Any
    mmgrpo_held = Stamp()

    def mmgrpo_stamp(self) -> dict[str, Any]:
        """Which weights the worker holds."""
        return self.mmgrpo_held.as_dict()

    def mmgrpo_forget(self) -> dict[str, Any]:
        """Hold nothing from now on: the memory of the weights is about to be given away."""
        self.mmgrpo_held = Stamp()
        return self.mmgrpo_stamp()

    def mmgrpo_load(
        self, weights: str | dict[str, Tensor], version: int, expected: str
    ) -> dict[str, Any]:
        """Replace all weights in place.

        Args:
            weights: folder with ``model.safetensors``, or checkpoint name -> tensor.
            version: number of the update.
            expected: digest of the weights.
        """
        self.mmgrpo_held = Stamp()
        try:
            named = (
                read_weights(Path(weights) / WEIGHTS_FILE) if isinstance(weights, str) else weights
            )
            _check(named, expected)
            self.reload_weights(weights_iterator=iter(named.items()))
            _pack_tied_weights(self.model_runner.get_model())
        except Exception as error:  # noqa: BLE001 - the trainer, in another process, tells the user
            self.mmgrpo_held = Stamp(error=f"{type(error).__name__}: {error}")
        else:
            self.mmgrpo_held = Stamp(int(version), expected)
        return self.mmgrpo_stamp()

    def mmgrpo_adapter(self, folder: str, name: str, version: int, expected: str) -> dict[str, Any]:
        """Confirm an adapter, which vLLM has just loaded from ``folder`` under ``name``."""
        self.mmgrpo_held = Stamp()
        try:
            _check(read_weights(Path(folder) / ADAPTER_FILE), expected)
            if not self.model_runner.list_loras():
                raise RuntimeError("the worker holds no adapter")
        except Exception as error:  # noqa: BLE001 - as above
            self.mmgrpo_held = Stamp(error=f"{type(error).__name__}: {error}")
        else:
            self.mmgrpo_held = Stamp(int(version), expected, name)
        return self.mmgrpo_stamp()


def _check(tensors: dict[str, Tensor], expected: str) -> None:
    found = digest(tensors)
    if found != expected:
        raise ValueError(
            f"the {len(tensors)} tensors that arrived have digest {found[:12]}, and the trainer "
            f"sent {expected[:12]}"
        )


def _pack_tied_weights(model: Any) -> None:
    """Renew the packed copies that vLLM keeps on a CPU of embeddings and heads.

    A head that is tied to the embedding is in no checkpoint, so vLLM does not pack it again when it
    reloads, and would go on with the old weights. Layers whose weights are packed in place have no
    weight left and were packed when they were loaded.
    """
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
            layer.quant_method.process_weights_after_loading(layer)
