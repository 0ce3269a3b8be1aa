"""Benchmarks: python tools/bench step|batch|models|partition|comm|pipeline; each has --help."""

from bench_cli import app

from dist_egnn.cli import console

if __name__ == "__main__":
    console(app)
