"""Releases of a language model: gains exchanged between two tokens, believed only when signed for this bundle and cohort."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import openai
import pytest
import run_models
import torch
from test_run_serve import ask, wait

from edge.experts.decode.sampling import Sampling
from edge.experts.model import Settings, load
from edge.experts.release import Live, Trust, gains_of, given, of_gains, trust
from edge.experts.serve import Server, ServeSettings
from edge.updater import Result
from refold import NormKind, SigningKey
from refold.cli import main
from refold.errors import ModelError, NormStateError, ReleaseError, SignatureError, UsageError
from refold.release import seal
from refold.signing import KeyRing

KEY = SigningKey.generate()
WHO = Trust(KeyRing([KEY.public]), "home")
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def running(paged):
    with load(paged.path, Settings(memory=paged.index.total)) as running:
        yield running


def gains(paged, factor=1.0, seed=1):
    """Other gains for every norm: within the trust region, and enough to change the text."""
    rng = np.random.default_rng(seed)
    exported = gains_of(paged.bundle, None)
    return {n: (g * factor * rng.uniform(0.5, 2, g.shape)).astype(np.float32) for n, g in exported.items()}


def signed(paged, version=1, key=KEY, cohort="home", **changes):
    release = of_gains(paged.bundle, changes.pop("gains", None) or gains(paged), cohort=cohort, version=version)
    return seal(replace(release, **changes), key).SerializeToString()


def text(running, tokens=10):
    writing = running.generate("Hello", Sampling(max_tokens=tokens))
    list(writing)
    return writing.tokens


def parameters(running):
    return {name: p.detach().numpy().copy() for name, p in running.model.named_parameters()}


def test_every_gain_of_the_model_is_a_site_and_exported_as_it_is_in_the_checkpoint(paged, running):
    sites = paged.bundle.norms.norms
    names = {n for n, _ in running.model.named_parameters() if "norm" in n}
    assert {s.name for s in sites} == names and all(s.kind is NormKind.RMS for s in sites)
    held = parameters(running)
    assert all(np.array_equal(held[n], g) for n, g in gains_of(paged.bundle, None).items())


def test_a_release_gives_what_a_model_with_those_gains_gives(paged, running, tmp_path):
    path = tmp_path / "r.release"
    path.write_bytes(signed(paged))
    before = text(running)
    running.put_gains(gains_of(paged.bundle, given(path, paged.bundle, WHO)))
    model = run_models.random_model("mixtral")
    with torch.no_grad():
        for name, gain in gains(paged).items():
            model.get_parameter(name).copy_(torch.from_numpy(gain))
    other = run_models.write(tmp_path / "other.refold", model)
    with load(other.path, Settings(memory=other.index.total)) as wanted:
        assert text(running) == text(wanted) != before
    running.put_gains(gains_of(paged.bundle, None))
    assert text(running) == before


def test_a_release_arrives_between_two_tokens_of_a_text_in_progress(paged, running):
    before = text(running, 30)
    writing = running.generate("Hello", Sampling(max_tokens=30))
    got = [next(writing).token for _ in range(5)]
    running.put_gains(gains(paged))
    got += [p.token for p in writing]
    assert got[:5] == before[:5] and got[6:] != before[6:] and len(got) == 30


def test_gains_that_give_no_finite_number_are_taken_back(paged, running):
    before, held = text(running), parameters(running)
    bad = gains(paged) | {"model.norm.weight": np.full(32, np.inf, np.float32)}
    with pytest.raises(ModelError, match="not finite"):
        running.put_gains(bad)
    with pytest.raises(NormStateError, match="nowhere"):
        running.put_gains({"nowhere": np.ones(32, np.float32)})
    assert text(running) == before and all(np.array_equal(held[n], p) for n, p in parameters(running).items())


def attacks(paged):
    stranger = SigningKey.generate()
    bits = bytearray(signed(paged))
    bits[40] ^= 1
    return {
        "unsigned": (signed(paged, key=stranger), SignatureError),
        "bad-signature": (bytes(bits), SignatureError),
        "wrong-bundle": (signed(paged, bundle_digest="0" * 64), ReleaseError),
        "wrong-cohort": (signed(paged, cohort="office"), ReleaseError),
        "expired": (signed(paged, expires_unix_ms=1000, created_unix_ms=500), ReleaseError),
        "trust-region": (signed(paged, states=dict(of_gains_unchecked(paged, 100.0))), NormStateError),
        "damaged": (b"\xff" * 100, ReleaseError),
    }


def of_gains_unchecked(paged, factor):
    states = of_gains(paged.bundle, gains(paged), cohort="home", version=1).states
    return {n: type(s)(s.gamma * np.float32(factor), s.beta) for n, s in states.items()}


@pytest.mark.parametrize(
    "code", ["unsigned", "bad-signature", "wrong-bundle", "wrong-cohort", "expired", "trust-region", "damaged"]
)
def test_a_release_that_is_not_to_be_believed_is_refused_and_the_old_gains_stay(paged, running, tmp_path, code):
    content, kind = attacks(paged)[code]
    (tmp_path / "r.release").write_bytes(content)
    with pytest.raises(kind) as e:
        given(tmp_path / "r.release", paged.bundle, WHO)
    assert e.value.code == code
    live = Live(paged.bundle, WHO, tmp_path / "data", running.put_gains)
    try:
        live.offer(signed(paged, version=2))
        held = parameters(running)
        with pytest.raises(kind):
            live.offer(content)
        assert live.version == 2 and all(np.array_equal(held[n], p) for n, p in parameters(running).items())
    finally:
        live.close()


def test_a_server_remembers_its_release_and_refuses_an_older_one(paged, running, tmp_path):
    first, second = signed(paged, 1, gains=gains(paged, seed=1)), signed(paged, 2, gains=gains(paged, seed=2))
    live = Live(paged.bundle, WHO, tmp_path, running.put_gains)
    assert [live.offer(c).result for c in (first, second, second)] == [Result.INSTALLED, Result.INSTALLED, Result.NOTHING]
    with pytest.raises(UsageError, match="Another daemon"):
        Live(paged.bundle, WHO, tmp_path, running.put_gains)
    live.close()
    running.put_gains(gains_of(paged.bundle, None))
    again = Live(paged.bundle, WHO, tmp_path, running.put_gains)
    try:
        assert again.version == 2 and np.array_equal(
            parameters(running)["model.norm.weight"], gains(paged, seed=2)["model.norm.weight"]
        )
        with pytest.raises(ReleaseError) as e:
            again.offer(first)
        assert e.value.code == "replayed"
    finally:
        again.close()


def test_making_a_release_checks_what_a_device_would(paged):
    with pytest.raises(NormStateError, match="no norm site"):
        of_gains(paged.bundle, {"nowhere": np.ones(32)}, cohort="home", version=1)
    with pytest.raises(NormStateError, match="trust region"):
        of_gains(paged.bundle, gains(paged, 100.0), cohort="home", version=1)
    with pytest.raises(ReleaseError):
        of_gains(paged.bundle, gains(paged), cohort="home", version=0)


def test_trust_comes_from_keys_or_an_identity_and_from_nowhere_else(tmp_path):
    assert trust(tmp_path, [KEY.public.hex()], "home").cohort == "home"
    with pytest.raises(UsageError, match="not enrolled"):
        trust(tmp_path)
    with pytest.raises(UsageError, match="64 hex digits"):
        trust(tmp_path, ["xyz"])


def test_a_server_takes_a_posted_release_in_mid_text_and_answers_why_it_refuses_one(paged, running, tmp_path):
    plain = text(running, 60)
    live = Live(paged.bundle, WHO, tmp_path, running.put_gains)
    server = Server(running, ServeSettings(port=0), live)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
            stream = iter(client.completions.create(model="m", prompt="Hello", max_tokens=200, stream=True))
            got = next(stream).choices[0].text
            wait(lambda: server.turns.length == 1)
            for code, (content, _) in attacks(paged).items():
                status, told = ask(server, "POST", "/refold/release", content, **BINARY)
                assert status in (400, 403) and told["error"]["code"] == code
            assert ask(server, "GET", "/refold/status")[1]["release_version"] == 0
            assert ask(server, "POST", "/refold/release", signed(paged, 3))[0] == 415
            told = ask(server, "POST", "/refold/release", signed(paged, 3), **BINARY)
            assert told == (200, {"result": "installed", "version": 3})
            assert server.turns.length == 1  # the text goes on
            got += "".join(p.choices[0].text for p in stream)
            after = client.completions.create(model="m", prompt="Hello", max_tokens=60).choices[0].text
        assert ask(server, "GET", "/refold/status")[1]["release_version"] == 3
    finally:
        server.drain()
        thread.join(60)
        live.close()
    assert after == bytes(text(running, 60)).decode(errors="replace") != bytes(plain).decode(errors="replace")
    assert got


def test_generate_takes_a_release_and_refuses_a_forged_one(paged, running, tmp_path, capfd):
    path = tmp_path / "r.release"
    path.write_bytes(signed(paged))
    command = ["edge", "generate", str(paged.path), "Hello", "--memory", "64KB", "--max-tokens", "8", "--json"]
    command += ["--release", str(path), "--cohort", "home", "--key"]
    running.put_gains(gains(paged))
    main([*command, KEY.public.hex()])
    assert json.loads(capfd.readouterr().out)["token_ids"] == text(running, 8)
    with pytest.raises(SystemExit) as e:
        main([*command, SigningKey.generate().public.hex()])
    out, err = capfd.readouterr()
    assert e.value.code == 6 and json.loads(out)["error"]["code"] == "unsigned" and "Traceback" not in err
