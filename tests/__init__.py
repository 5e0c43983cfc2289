"""Tests of clipsmall: a folder for each wing of the code, a file for each of its modules or
habits.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
