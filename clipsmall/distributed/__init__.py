"""Work over ranks and devices: the only room that speaks torch.distributed."""
