"""The dispatcher's gRPC service: questions about deliveries, redriving, suppressions."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from hashlib import sha256
from typing import Protocol
from uuid import UUID

import grpc

from carillon.dispatcher.v1 import dispatcher_pb2 as pb
from carillon.dispatcher.v1 import dispatcher_pb2_grpc as pb_grpc
from libs.clock import Clock
from libs.errors import InvalidArgument, NotFound, Violations
from libs.postgres import Database, Transaction
from libs.rpc import tenant_of
from libs.wire import (
    check_count,
    check_id,
    check_page_size,
    check_text,
    from_timestamp,
    page_token,
    read_page_token,
    to_timestamp,
)
from services.dispatcher.addresses import MAX_ADDRESS, is_valid_address
from services.dispatcher.delivery import CHANNELS, State
from services.dispatcher.store_records import AttemptRecord, DeliveryRecord, Suppression, explain

MAX_KEY = 128
MAX_REDRIVEN = 1_000
MAX_EXPLAINED = 100

Context = grpc.aio.ServicerContext[object, object]
After = tuple[datetime, UUID]
