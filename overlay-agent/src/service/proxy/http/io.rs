//! The connection of a client below HTTP.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use rustix::net::sockopt::set_socket_linger;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::{super::relay::Activity, tunnel::Tunnel};

/// What is known about the connection of a client.
#[derive(Debug)]
pub(super) struct ClientState {
    /// When bytes last moved.
    pub(super) activity: Activity,
    /// Whether the connection is closed, and not reset, when it is dropped.
    ends_well: AtomicBool,
    /// What follows after HTTP.
    tunnel: Mutex<Option<Tunnel>>,
}

impl ClientState {
    pub(super) fn new() -> Self {
        Self { activity: Activity::new(), ends_well: AtomicBool::new(false), tunnel: Mutex::default() }
    }

    /// What has been sent is complete.
    pub(super) fn set_ends_well(&self) {
        self.ends_well.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_tunnel(&self, tunnel: Tunnel) {
        *self.tunnel.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }

    pub(super) fn take_tunnel(&self) -> Option<Tunnel> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The connection. Unless it ends well, it is reset: a client must not take for complete what is not.
#[derive(Debug)]
pub(super) struct ClientIo {
    /// `None` once it has been taken out.
    stream: Option<TcpStream>,
    state: Arc<ClientState>,
}

impl ClientIo {
    pub(super) fn new(stream: TcpStream, state: Arc<ClientState>) -> Self {
        Self { stream: Some(stream), state }
    }

    /// The connection itself.
    pub(super) fn into_stream(mut self) -> Option<TcpStream> {
        self.stream.take()
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        self.stream.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Notes that bytes have moved.
    fn note<T>(&self, moved: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if matches!(moved, Poll::Ready(Ok(_))) {
            self.state.activity.note();
        }
        moved
    }
}

impl Drop for ClientIo {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream
            && !self.state.ends_well.load(Ordering::Relaxed)
        {
            let _ = set_socket_linger(stream, Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let moved = self.stream()?.poll_read(cx, buffer);
        self.note(moved)
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let moved = self.stream()?.poll_write(cx, bytes);
        self.note(moved)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let moved = self.stream()?.poll_write_vectored(cx, slices);
        self.note(moved)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(TcpStream::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }
}
