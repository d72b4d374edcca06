"""Reports: many small ones at once, in a queue of their own."""

import time

from celery import group

from shop.celery import app
from shop.database import data, execute


@app.task
def report(day):
    (count,) = execute("SELECT count(*) FROM orders")[0]
    path = data() / f"report-{day}"
    path.write_text(f"{day}: {count}\n")
    return path.name


@app.task(bind=True)
def queue_of_reports(self):
    return self.request.delivery_info["routing_key"]


@app.task
def slow_report():
    time.sleep(30)


@app.task
def order_another(day):
    """A task that calls another one, and does not wait."""
    return report.delay(day).id


@app.task(name="books.close")
def close_books(year, *, final=False):
    return f"{year} {'closed' if final else 'open'}"


class Average(app.Task):
    """A task as a class."""

    name = "average"

    def run(self, numbers):
        return sum(numbers) / len(numbers)


average = app.register_task(Average())


def week():
    """A report of each day, together."""
    return group(report.s(f"day-{n}") for n in range(7))()
