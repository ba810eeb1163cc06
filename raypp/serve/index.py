"""The server's root: lists the running services and how to start the attacks."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection
from html import escape

from fastapi import Depends, FastAPI, Request, Response
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

import raypp
from raypp.serve.admission import RequestError
from raypp.serve.middleware import RequestObserver, add_middleware
from raypp.serve.request_checks import check_bare, negotiate
from raypp.serve.schemas import HTML, JSON

CLASSIFIER, ATTACK = "/classifier", "/attack"
SERVICES = {"classifier": "Classifies protected images.", "attack": "Shows what attackers recover."}
SWITCH_ON = (
    "The attack service is off; start it with raypp serve BUNDLE --with-attacks or the lines of serve_config.yaml."
)


class Server(Starlette):
    """The classifier below ``/classifier``, and an index at the root.

    If Serve's own ``route_prefix`` is ``/classifier``, as in older configurations, the classifier answers alone.
    """

    def __init__(
        self, classifier: FastAPI, running: Callable[[], Awaitable[Collection[str]]], observe: RequestObserver
    ) -> None:
        super().__init__(routes=[Mount(CLASSIFIER, classifier), Mount("/", index_api(running, observe))])
        self.router.redirect_slashes = False
        self.classifier = classifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root_path = scope.get("root_path", "")
        if root_path.endswith(CLASSIFIER):
            await self.classifier(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].startswith(f"{root_path}{CLASSIFIER}/"):
            # What the Mount would do, without Starlette's layers around it.
            await self.classifier({**scope, "root_path": root_path + CLASSIFIER}, receive, send)
        else:
            await super().__call__(scope, receive, send)


def index_api(running: Callable[[], Awaitable[Collection[str]]], observe: RequestObserver) -> FastAPI:
    """The index; ``running`` returns the names of the running services."""
    api = FastAPI(title="raypp", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    add_middleware(api, observe)

    @api.get("/", dependencies=[Depends(check_bare)])
    async def index(request: Request) -> Response:
        media_type = negotiate(request.headers.getlist("accept"), (JSON, HTML))
        root, names = request.scope.get("root_path", ""), await running()
        services = [
            {"name": name, "about": about, "docs": f"{root}/{name}/docs", "openapi": f"{root}/{name}/openapi.json"}
            for name, about in SERVICES.items()
            if name in names
        ]
        hint = {} if "attack" in names else {"hint": SWITCH_ON}
        if media_type == HTML:
            return Response(_page(services, hint.get("hint", "")), media_type=HTML)
        return Response(json.dumps({"raypp": raypp.__version__, "services": services} | hint), media_type=JSON)

    @api.get(CLASSIFIER, dependencies=[Depends(check_bare)])
    async def classifier(request: Request) -> Response:
        return Response(status_code=307, headers={"Location": f"{request.scope.get('root_path', '')}{CLASSIFIER}/docs"})

    @api.api_route(ATTACK, methods=["GET", "POST"])
    @api.api_route(ATTACK + "/{rest:path}", methods=["GET", "POST"])
    async def attack() -> Response:
        # Serve routes these paths here only while the attack application does not run.
        raise RequestError(404, "attack-service-off", SWITCH_ON)

    return api


def _page(services: list[dict[str, str]], hint: str) -> str:
    items = [
        f'<li><a href="{escape(service["docs"])}">{escape(service["name"])}</a>: {escape(service["about"])}</li>'
        for service in services
    ]
    footer = f"<p>{escape(hint)}</p>" if hint else ""
    style = "body{font-family:system-ui,sans-serif;max-width:40rem;margin:3rem auto;padding:0 1rem;line-height:1.5}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>raypp</title><style>{style}</style></head>'
        f"<body><h1>raypp {escape(raypp.__version__)}</h1><p>The running services, with their documentation:</p>"
        f"<ul>{''.join(items)}</ul>{footer}</body></html>"
    )
