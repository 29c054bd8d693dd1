import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from services.cache.keys import copy_of, original_of
from services.cache.redis_url import RedisUrl
from services.cache.slots import SLOTS, SlotTable, slot_of

A, B = ("10.0.0.1", 7000), ("10.0.0.2", 7001)
REPLY = [
    [0, 8_191, [b"10.0.0.1", 7000, b"id-a"], [b"10.0.0.9", 7009, b"replica"]],
    [8_192, SLOTS - 1, [b"10.0.0.2", 7001, b"id-b"]],
]


@given(st.binary(max_size=40) | st.text("{}ab", max_size=8).map(str.encode))
def test_slots_are_the_client_s_own(key):
    assert slot_of(key) == key_slot(key)


def test_keys_are_grouped_by_who_owns_their_slots():
    table = SlotTable.of(REPLY, ("seed", 1))
    keys = [b"k%d" % i for i in range(100)]
    groups = table.group(keys)
    assert table.addresses == {A, B}
    assert sorted(key for mine in groups.values() for key in mine) == sorted(keys)
    assert all((slot_of(key) < 8_192) == (owner == A) for owner, mine in groups.items() for key in mine)
    slot = slot_of(keys[0])
    table.moved(slot, ("10.0.0.3", 7002))
    assert table.owner(keys[0]) == ("10.0.0.3", 7002)


def test_a_server_that_does_not_know_its_host_is_where_it_was_asked():
    for host in (b"", None, b"?"):
        assert SlotTable.of([[0, 9, [host, 7000, b"id"]]], ("seed", 1)).addresses == {("seed", 7000)}


def test_slots_without_an_owner_belong_to_nobody():
    assert SlotTable().group([b"k"]) == {None: [b"k"]}


@pytest.mark.parametrize(
    "reply", [[1], [[0, 5]], [[0, 5, []]], [["x", 1, [b"h", 1]]], [[0, 99_999, [b"h", 1]]]]
)
def test_a_reply_that_is_none_is_refused(reply):
    with pytest.raises(ValueError, match="not the slots"):
        SlotTable.of(reply, ("seed", 1))


def test_a_url_names_one_server_or_the_seeds_of_a_cluster():
    one = RedisUrl.parse("redis://me:p%40ss@host:7000/3")
    assert (one.cluster, one.seeds) == (False, [("host", 7000)])
    many = RedisUrl.parse("rediss+cluster://me:p%40ss@a:1,[::1]:2,c/0?ssl_ca_certs=/ca.pem")
    assert (many.cluster, many.seeds) == (True, [("a", 1), ("::1", 2), ("c", 6379)])
    pool = many.pool(("a", 1), connections=1, op_timeout_ms=50)
    told = pool.connection_kwargs
    assert (told["username"], told["password"], told["ssl_ca_certs"]) == ("me", "p@ss", "/ca.pem")
    assert pool.connection_class.__name__ == "SSLConnection"


@pytest.mark.parametrize(
    "url", ["localhost:1", "http://a", "redis+cluster://", "redis+cluster://a:x", "redis+cluster://a:1/3"]
)
def test_a_url_that_is_none_is_refused_without_its_secrets(url):
    with pytest.raises(ValueError, match=r"URL|database|scheme") as refused:
        RedisUrl.parse(url.replace("://", "://user:secret@"))
    assert "secret" not in str(refused.value)


@given(st.binary(min_size=1, max_size=30), st.integers(0, 9))
def test_copies_of_a_key_tell_their_original(digest, number):
    key = b"rf1:a:7:" + digest
    assert original_of(copy_of(key, number)) == key
    assert (copy_of(key, number) == key) == (number == 0)
