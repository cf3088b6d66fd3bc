//! Bodies on their way, frame by frame: nothing is kept.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use hyper::{
    Error,
    body::{Body, Bytes, Frame, Incoming, SizeHint},
};

use super::{
    super::counters::{Direction, Opened},
    pool::Connection,
};

/// The body of a request, on its way to an endpoint.
#[derive(Debug, Default)]
pub(super) struct RequestBody {
    /// `None` when it is empty.
    incoming: Option<Incoming>,
    /// The request at the endpoint to which it goes.
    opened: Option<Arc<Opened>>,
}

impl RequestBody {
    pub(super) fn new(incoming: Incoming) -> Self {
        Self { incoming: Some(incoming).filter(|incoming| !incoming.is_end_stream()), opened: None }
    }

    /// What counts its bytes.
    pub(super) fn set_opened(&mut self, opened: &Arc<Opened>) {
        self.opened = Some(Arc::clone(opened));
    }
}

/// The body of a response, on its way to a client.
#[derive(Debug)]
pub(super) enum ReplyBody {
    /// A text of the proxy.
    Text(Option<Bytes>),
    /// That of an endpoint.
    Endpoint(Box<Relayed>),
}

/// The body of an endpoint's response.
#[derive(Debug)]
pub(super) struct Relayed {
    incoming: Incoming,
    opened: Arc<Opened>,
    /// Until the body has ended: then it waits for the next request.
    connection: Option<Connection>,
}

impl ReplyBody {
    pub(super) fn relayed(incoming: Incoming, opened: Arc<Opened>, connection: Connection) -> Self {
        let mut relayed = Relayed { incoming, opened, connection: Some(connection) };
        if relayed.incoming.is_end_stream() {
            relayed.give_back();
            return Self::Text(None);
        }
        Self::Endpoint(Box::new(relayed))
    }
}

impl Relayed {
    fn give_back(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.give_back();
        }
    }
}

/// Passes on the next frame, and counts it.
fn next(
    incoming: &mut Incoming,
    opened: Option<&Opened>,
    direction: Direction,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
    let frame = ready!(Pin::new(incoming).poll_frame(cx));
    if let (Some(Ok(frame)), Some(opened)) = (&frame, opened)
        && let Some(data) = frame.data_ref()
    {
        opened.count_bytes(direction, data.len());
    }
    Poll::Ready(frame)
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Self { incoming, opened } = &mut *self;
        match incoming {
            None => Poll::Ready(None),
            Some(incoming) => next(incoming, opened.as_deref(), Direction::ToEndpoint, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut *self {
            Self::Text(text) => Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Self::Endpoint(relayed) => {
                let opened = Arc::clone(&relayed.opened);
                let frame = ready!(next(&mut relayed.incoming, Some(&opened), Direction::ToClient, cx));
                match &frame {
                    Some(Err(_)) => relayed.connection = None,
                    Some(Ok(frame)) if frame.is_data() && !relayed.incoming.is_end_stream() => {}
                    Some(Ok(_)) | None => relayed.give_back(),
                }
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Text(text) => text.is_none(),
            Self::Endpoint(relayed) => relayed.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Text(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Self::Endpoint(relayed) => relayed.incoming.size_hint(),
        }
    }
}
