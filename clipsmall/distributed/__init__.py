"""Code for several ranks and devices; only `world` calls torch.distributed."""
