"""Work over ranks and devices; `world` alone speaks torch.distributed."""
