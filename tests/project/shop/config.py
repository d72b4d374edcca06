"""The shop's Celery configuration."""

import os

broker_url = os.environ.get("SHOP_BROKER")
result_backend = os.environ.get("SHOP_RESULTS")
task_default_queue = "shop"
task_routes = {"shop.reports.*": {"queue": "reports"}}
task_annotations = {"shop.reports.slow_report": {"soft_time_limit": 1}}
result_extended = True
result_expires = 3600
beat_schedule = {"sweep": {"task": "shop.orders.sweep", "schedule": 0.5, "args": ("beat",)}}
worker_send_task_events = True
task_send_sent_event = True
