"""What the shop's tasks have in common."""

from celery import Task

from shop.database import note


class Audited(Task):
    """A task whose ends are in the journal."""

    abstract = True

    def on_success(self, retval, task_id, args, kwargs):
        note("success", f"{self.name} {task_id}")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note("failure", f"{self.name} {type(exc).__name__}")

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        note("retry", f"{self.name} {type(exc).__name__}")

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        note("return", f"{self.name} {status}")
