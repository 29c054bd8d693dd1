"""One peer and its callers, in the environment where peers are installed; told what to do line by line.

`python -m loadtests.peers.process NAME DIRECTORY MATERIAL URL`: MATERIAL is an .npz of vectors, buckets and
queries. Each line of stdin is a question in JSON, each of stdout its answer.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.peers.contender import Contender, made

K, BATCH_ROWS = 10, 32
_TIE = 1e-5


class Trial:
    """A peer, loaded and tuned, under closed loops of callers."""

    def __init__(
        self, peer: Contender, vectors: np.ndarray, buckets: np.ndarray, queries: np.ndarray
    ) -> None:
        self._peer, self._vectors, self._buckets, self._queries = peer, vectors, buckets, queries

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a question comes to."""
        match question["do"]:
            case "load":
                began_s = time.perf_counter()
                self._peer.load(self._vectors, self._buckets)
                return {"per_s": len(self._vectors) / (time.perf_counter() - began_s)}
            case "tune":
                return self._tune(question["recall"], question["below"])
            case "c1" | "c16" | "filter1" as load:
                below = question["below"] if load == "filter1" else None
                callers = 1 if load == "c1" else 16
                return {"per_s": self._loop(callers, question["seconds"], lambda i: self._search(i, below))}
            case "batch32":
                return {"per_s": BATCH_ROWS * self._loop(4, question["seconds"], self._batch)}
        raise ValueError(f"no such question: {question['do']}")

    def _tune(self, recall: float, below: int) -> dict[str, Any]:
        """The least effort that finds enough, and what it finds, also of those that a filter passes."""
        found = 0.0
        for effort in self._peer.efforts:
            self._peer.set_effort(effort)
            found = self._recall(None)
            if found >= recall:
                break
        return {"effort": effort, "recall": found, "filtered_recall": self._recall(below)}

    def _recall(self, below: int | None) -> float:
        found = wanted = 0
        for query in self._queries:
            scores = self._vectors @ query
            if below is not None:
                scores = np.where(self._buckets < below, scores, -np.inf)
            k = min(K, int(np.isfinite(scores).sum()))
            least = np.partition(scores, -k)[-k] - _TIE
            found += sum(scores[row] >= least for row in set(self._peer.search(query, K, below)))
            wanted += k
        return found / wanted

    def _search(self, number: int, below: int | None) -> object:
        return self._peer.search(self._queries[number % len(self._queries)], K, below)

    def _batch(self, number: int) -> object:
        start = number * BATCH_ROWS % max(1, len(self._queries) - BATCH_ROWS + 1)
        return self._peer.batch(self._queries[start : start + BATCH_ROWS], K)

    @staticmethod
    def _loop(callers: int, seconds: float, call: Callable[[int], object]) -> float:
        """Calls a second, each caller a thread that calls again as soon as it is answered."""
        counts, failures = [0] * callers, list[Exception]()
        began_s = time.perf_counter()

        def work(caller: int) -> None:
            try:
                while time.perf_counter() < began_s + seconds:
                    call(caller + callers * counts[caller])
                    counts[caller] += 1
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(caller,)) for caller in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return sum(counts) / (time.perf_counter() - began_s)


def main() -> int:
    """Answer until stdin ends."""
    name, directory, material, url = sys.argv[1:]
    # Peers print to stdout as they please; answers go where they cannot.
    answers, sys.stdout = sys.stdout, sys.stderr
    told = np.load(material)
    peer = made(name, Path(directory), url)
    trial = Trial(peer, told["vectors"], told["buckets"], told["queries"])
    try:
        for line in sys.stdin:
            try:
                answer = trial.answer(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
