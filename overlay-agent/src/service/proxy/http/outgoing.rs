//! A request on its way to an endpoint, which may have to be sent more than once.

use std::sync::Arc;

use hyper::{Method, Request, body::Body, http::request::Parts};

use super::{super::counters::Opened, body::RequestBody};

/// A request.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// It can be sent again after it may have arrived: that changes nothing (RFC 9110 section 9.2.2), and it has no body.
    Repeatable(Box<Parts>),
    /// It can be sent once; `None` when it may have arrived.
    Once(Option<Box<Request<RequestBody>>>),
}

impl Outgoing {
    pub(super) fn new(parts: Parts, body: RequestBody) -> Self {
        let is_idempotent =
            [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE, Method::TRACE];
        match is_idempotent.contains(&parts.method) && body.is_end_stream() {
            true => Self::Repeatable(Box::new(parts)),
            false => Self::Once(Some(Box::new(Request::from_parts(parts, body)))),
        }
    }

    /// The request to send; `None` when it may have arrived and must not be sent again.
    pub(super) fn take(&mut self, opened: &Arc<Opened>) -> Option<Request<RequestBody>> {
        let mut request = match self {
            Self::Repeatable(parts) => Request::from_parts(parts.as_ref().clone(), RequestBody::default()),
            Self::Once(request) => *request.take()?,
        };
        request.body_mut().set_opened(opened);
        Some(request)
    }

    /// It was not sent.
    pub(super) fn put_back(&mut self, request: Request<RequestBody>) {
        match self {
            Self::Repeatable(_) => {}
            Self::Once(taken) => *taken = Some(Box::new(request)),
        }
    }

    /// Whether it can be sent.
    pub(super) fn can_be_sent(&self) -> bool {
        match self {
            Self::Repeatable(_) => true,
            Self::Once(request) => request.is_some(),
        }
    }
}
