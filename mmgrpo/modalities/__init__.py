"""What differs between modalities when a run is put together: one small file for each kind."""

from mmgrpo.modalities.modality import Modality

__all__ = ["Modality"]
