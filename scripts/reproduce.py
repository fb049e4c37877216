"""Merge the models of eight tasks by every multi-task method and compare the results: minutes on two cores.

    python scripts/reproduce.py --write docs/reproduce.md

Accuracy is normalised: that of a merged model over that of the task's own fine-tune, mean over the tasks, in percent.
The tables show the test split; all settings of methods are chosen on the validation split.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from eight_merges import LAMBDAS, Bench, Row, Score, all_rows
from eight_tasks import Setting, experiment
from reproduce_text import document, tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
