"""Any traceable net: its spaces, OT fusion of such nets, and a few architectures of any widths."""

from slimfuse.nets.classifier import (
    Classifier,
    Footprint,
    footprint,
    load_classifier,
    new_classifier,
)
from slimfuse.nets.fusion import NetFusion, fuse_nets, reestimate, vanilla
from slimfuse.nets.graph import Graph, Writer, graph_of
from slimfuse.nets.pruning import prune, pruned_config
from slimfuse.nets.zoo import (
    Config,
    MLPConfig,
    ResNetConfig,
    VGGConfig,
    build,
    load,
    load_config,
    narrow,
    save,
)

__all__ = [
    "Classifier", "Config", "Footprint", "Graph", "MLPConfig", "NetFusion", "ResNetConfig",
    "VGGConfig", "Writer", "build", "footprint", "fuse_nets", "graph_of", "load",
    "load_classifier", "load_config", "narrow", "new_classifier", "prune", "pruned_config",
    "reestimate", "save", "vanilla",
]  # fmt: skip
