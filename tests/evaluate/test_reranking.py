"""Re-ranking: the order of the nearest few by other scores, against the ranks of a whole matrix of similarities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vladva.benchmarks.metrics import hits_at, rank_scores
from vladva.evaluate import reranking
from vladva.evaluate.benchmark_embeddings import Embeddings, items
from vladva.evaluate.reranking import Pair, in_order_of, key_of_pair, rerank
from vladva.evaluate.scoring import read_benchmarks


@pytest.mark.parametrize("k", [2, 5, 12])
@pytest.mark.parametrize("levels", [3, 1000])
def test_reordered_ranks_are_those_of_the_whole_matrix(k: int, levels: int) -> None:
    random = np.random.default_rng(k * levels)
    similarity = random.permutation(40 * 12).reshape(40, 12) / 480  # no ties among cosines
    query_labels, gallery_labels = random.integers(0, 5, 40), np.arange(12) % 5
    before = rank_scores(similarity.astype(np.float32), query_labels, gallery_labels, keep=k)
    answers = random.integers(0, levels, (40, 12)) / levels  # with few levels many are equal
    answers_Qk = np.take_along_axis(answers, before.nearest, axis=1)
    right_Qk = gallery_labels[before.nearest] == query_labels[:, None]
    found = in_order_of(before, answers_Qk, right_Qk)

    whole = similarity.copy()  # the nearest k above all others, in the order of the answers
    np.put_along_axis(whole, before.nearest, 2 + answers_Qk, axis=1)
    expected = rank_scores(whole, query_labels, gallery_labels, keep=k)
    np.testing.assert_array_equal(found.above, expected.above)
    np.testing.assert_array_equal(found.tied, expected.tied)
    np.testing.assert_array_equal(found.tied_positives, expected.tied_positives)
    np.testing.assert_allclose(found.similarity, expected.similarity - 2, atol=1e-6)
    for policy in ("strict", "expected"):
        assert hits_at(found, k).mean(policy) == hits_at(before, k).mean(policy)  # below k nothing moves
    assert (found.above != before.above).any()  # and something does above it


class Oracle:
    """A generator that knows which image each caption belongs to, or says the opposite."""

    def __init__(self, right: set[bytes], truthful: bool) -> None:
        self.right, self.truthful, self.asked = right, truthful, 0

    def __call__(self, model: str, pairs: list[Pair], **_: object) -> dict[bytes, float]:
        keys = {key_of_pair(pair) for pair in pairs}
        self.asked += len(keys)
        return {key: 0.9 if (key in self.right) == self.truthful else 0.1 for key in keys}


@pytest.fixture(scope="module")
def embeddings() -> type:
    class Random(Embeddings):
        """Random vectors for whatever text or image is asked for."""

        def __init__(self) -> None:
            self.quarantine: dict[str, str] = {}

        def _rows(self, ids: list[str]) -> np.ndarray:
            return np.stack([np.random.default_rng(abs(hash(one)) % 2**32).standard_normal(8) for one in ids])

    return Random


@pytest.mark.parametrize("truthful", [True, False])
def test_a_generator_that_knows_lifts_the_first_place_to_what_is_among_the_k(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, embeddings: type, truthful: bool
) -> None:
    tasks = read_benchmarks(["scenes_retrieval", "scenes_compositionality"], str(scenes))
    retrieval, choice = tasks["scenes_retrieval"], tasks["scenes_compositionality"]
    right = {
        key_of_pair((retrieval.images[i], retrieval.texts[t]))
        for i, t in zip(retrieval.caption_image, retrieval.caption_text, strict=True)
    }
    for image, caption, _ in choice.triples.values():
        right |= {key_of_pair((choice.images[i], choice.texts[t])) for i, t in zip(image, caption, strict=True)}
    oracle = Oracle(right, truthful)
    monkeypatch.setattr(reranking, "ask_about", oracle)
    vectors = embeddings()
    before = {name: vectors.score(task) for name, task in tasks.items()}
    after = rerank("tiny", tasks, vectors, 10)
    assert oracle.asked > 0
    scores, old = after["scenes_retrieval"].scores, before["scenes_retrieval"].scores
    for direction in ("t2i", "i2t"):
        assert scores[f"{direction}_r10"] == pytest.approx(old[f"{direction}_r10"])
        assert scores[f"{direction}_r1"] == pytest.approx(old[f"{direction}_r10"] if truthful else 0, abs=1e-9)
    assert set(after["scenes_compositionality"].scores.values()) == ({1.0} if truthful else {0.0})
    assert len(items(tasks.values())) > 0


def test_what_is_no_order_is_refused(scenes: Path, embeddings: type) -> None:
    tasks = read_benchmarks(["scenes_retrieval"], str(scenes))
    with pytest.raises(ValueError, match="rerank is 1; give how many"):
        rerank("tiny", tasks, embeddings(), 1)
