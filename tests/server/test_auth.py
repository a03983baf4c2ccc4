"""Who may ask: keys, hosts, origins."""

import pytest

from live import live, make_store
from moecl.errors import ConfigError
from moecl.server.auth import Keys, read_keys
from moecl.server.settings import Settings

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_folder):
    return make_store(tmp_path_factory.mktemp("store"), tiny_folder, "mood")


@pytest.fixture(scope="module")
def server(store):
    with live(store, keys=KEYS, origins=("https://a.example",)) as found:
        yield found


@pytest.mark.parametrize("path", ["/v1/models", "/v1/run", "/metrics", "/openapi.json", "/nothing"])
def test_a_key_is_needed(server, path):
    refused = server.client.get(path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert refused.headers["www-authenticate"] == "Bearer"
    for key in KEYS:
        allowed = server.client.get(path, headers={"Authorization": f"Bearer {key}"})
        assert allowed.status_code == (404 if path == "/nothing" else 200)
    for header in ("Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer", "Bearer \u00e9"):
        assert server.client.get(path, headers={"Authorization": header.encode()}).status_code == 401


def test_a_body_is_not_read_without_a_key(server):
    assert server.post("/v1/classify", model="mood", input="x").status_code == 401


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/healthz", "/readyz"])
def test_what_tells_nothing_needs_no_key(server, path):
    answer = server.client.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_openais_client_may_ask_from_a_page(server):
    headers = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang,x-stainless-retry-count",
    }
    assert server.client.options("/v1/chat/completions", headers=headers).status_code == 200
    answer = server.client.get("/healthz", headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-expose-headers"] == "Retry-After, x-request-id"


def test_pages_of_one_origin_may_ask(server):
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"  # of OpenAI's client
        return server.client.options("/v1/classify", headers=headers).headers.get("access-control-allow-origin")

    assert allowed("https://a.example") == "https://a.example"
    assert allowed("https://b.example") is None
    headers = {"Origin": "https://a.example", "Authorization": "Bearer first-key"}
    told = server.client.get("/v1/models", headers=headers).headers["access-control-expose-headers"]
    assert "Retry-After" in told


def test_without_keys_only_this_machine_is_served(store):
    with live(store) as server:
        assert server.client.get("/v1/models").status_code == 200
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
            assert server.client.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            refused = server.client.get("/v1/models", headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert (
            "access-control-allow-origin" not in server.client.get("/", headers={"Origin": "https://a.example"}).headers
        )


def test_keys_of_a_file_and_of_the_environment(tmp_path):
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nfirst-key\n\n  second-key  \n")
    assert read_keys(file, {"MOECL_API_KEYS": "third-key, fourth-key,"}) == (*KEYS, "third-key", "fourth-key")
    assert read_keys(None, {}) == read_keys(None, {"MOECL_API_KEYS": ""}) == ()
    assert read_keys(None, {"MOECL_API_KEYS": "#s3cret"}) == ("#s3cret",), "a remark is for a file"
    with pytest.raises(ConfigError, match="MOECL_API_KEYS: holds no key"):
        read_keys(None, {"MOECL_API_KEYS": " , "})
    assert Keys(KEYS).allow(b"bearer second-key")
    assert not Keys(()).allow(b"Bearer ")


@pytest.mark.parametrize(
    ("text", "message"),
    [("# none\n", "holds no key"), ("two words\n", "key 1 has a space"), ("fine\nk\u00e9y\n", "key 2 has")],
)
def test_keys_that_cannot_be(tmp_path, text, message):
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_keys(file, {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback(host, tmp_path):
    found = Settings(run=tmp_path, host=host, timeout=0.5)
    assert found.loopback
    assert found.stop_seconds == 2, "what was taken may take its time to the end"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_others_need_keys(host, tmp_path):
    with pytest.raises(ConfigError, match="others can reach it; give --api-key"):
        Settings(run=tmp_path, host=host)
    assert not Settings(run=tmp_path, host=host, keys=KEYS).loopback
