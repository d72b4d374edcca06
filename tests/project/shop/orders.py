"""Orders: checked, paid, confirmed; each step a task."""

from celery import chain
from celery.exceptions import Ignore

from shop.base import Audited
from shop.celery import app
from shop.database import data, execute, note


class GatewayDown(Exception):
    """The bank does not answer."""


class OutOfStock(Exception):
    """There is no more of an item."""

    def __init__(self, item):
        super().__init__(item)
        self.item = item


def call_bank(order):
    """Fails as often as the file of the order says; a real shop's bank does without a file."""
    left = data() / f"bank-{order}"
    n = int(left.read_text()) if left.exists() else 0
    if n:
        left.write_text(str(n - 1))
        raise GatewayDown(order)
    note("paid", order)


@app.task(base=Audited)
def check(order, item, amount):
    rows = execute("SELECT n FROM stock WHERE item = ?", item)
    if not rows or rows[0][0] < amount:
        raise OutOfStock(item)
    execute("INSERT INTO orders VALUES (?, ?, 'checked')", order, amount)
    return order


@app.task(base=Audited, autoretry_for=(GatewayDown,), retry_backoff=0.1, retry_jitter=False, max_retries=3)
def pay(order):
    call_bank(order)
    execute("UPDATE orders SET state = 'paid' WHERE id = ?", order)
    return order


@app.task(bind=True, base=Audited, max_retries=2)
def pay_by_hand(self, order):
    """The same with explicit retries; returns how many there were."""
    try:
        call_bank(order)
    except GatewayDown as error:
        raise self.retry(exc=error, countdown=0.1) from error
    return self.request.retries


@app.task
def confirm(order, mail=""):
    execute("UPDATE orders SET state = 'confirmed' WHERE id = ?", order)
    note("mail", f"{order} {mail}".strip())
    return {"order": order, "state": "confirmed"}


@app.task
def give_up(request, error, traceback, order):
    """Error callback."""
    execute("UPDATE orders SET state = ? WHERE id = ?", type(error).__name__, order)
    note("given up", f"{order} {type(error).__name__}")


@app.task(bind=True)
def count_retries(self, n):
    """Tries until the n-th retry, with other arguments each time."""
    note("try", n)
    if n > 0:
        raise self.retry(args=(n - 1,), countdown=0)
    return self.request.retries


@app.task(bind=True)
def what_am_i(self):
    request = self.request
    return {
        "id": request.id,
        "name": self.name,
        "retries": request.retries,
        "queue": request.delivery_info["routing_key"],
        "trace": (request.headers or {}).get("trace"),
        "is_eager": request.is_eager,
    }


@app.task(ignore_result=True)
def forgettable(word):
    note("forgettable", word)
    return word


@app.task
def never_mind():
    raise Ignore()


@app.task
def sweep(who):
    note("sweep", who)


def place(order, item, amount):
    """The whole way of an order, as the shop's web site starts it."""
    steps = chain(check.s(order, item, amount), pay.s(), confirm.s(mail="thank you"))
    return steps.on_error(give_up.s(order)).delay()
