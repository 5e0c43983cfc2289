"""The config of a run: its schema, and how it is read from YAML and the command line."""

from clipsmall.config.schema import Config

__all__ = ["Config"]
