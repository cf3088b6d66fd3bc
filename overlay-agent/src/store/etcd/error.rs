//! Errors of etcd's client, sorted by the action that they call for.

use std::error::Error as StdError;

use etcd_client::Error;
use tonic::Code;

use crate::store::StoreError;

/// etcd's messages for wrong credentials and for none. Their status code is the one for malformed requests.
const NOT_LOGGED_IN: [&str; 2] = ["authentication failed", "user name is empty"];

/// etcd's message for a login from before its users changed: a new connection brings a new login.
const OLD_LOGIN: &str = "revision of auth store is old";

/// The error of a request that etcd did not answer with success. [`StoreError::Failed`] says nothing about the connection;
/// the others call for a new one: another endpoint may answer, and a token that cannot be renewed needs a new login.
pub(super) fn store_error(operation: &str, error: &Error) -> StoreError {
    let (operation, why) = (operation.to_owned(), describe(error));
    let Error::GRpcStatus(status) = error else {
        let is_local = matches!(
            error,
            Error::InvalidArgs(_)
                | Error::InvalidUri(_)
                | Error::Utf8Error(_)
                | Error::InvalidMetadataValue(_)
        );
        return if is_local || is_no_lease(error) {
            StoreError::Failed { operation, why }
        } else {
            StoreError::Away { operation, why }
        };
    };
    let code = status.code();
    let not_logged_in = NOT_LOGGED_IN.iter().any(|words| status.message().contains(words));
    if not_logged_in || matches!(code, Code::Unauthenticated | Code::PermissionDenied) {
        return StoreError::Denied { operation, why };
    }
    // These answer the request itself. All other errors may be those of this connection or of its login: unknown and internal are
    // what a connection that breaks half-way looks like, and authentication that is switched off is a failed precondition.
    let answers = matches!(
        code,
        Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::OutOfRange | Code::Unimplemented
    );
    if answers && !status.message().contains(OLD_LOGIN) {
        StoreError::Failed { operation, why }
    } else {
        StoreError::Away { operation, why }
    }
}

/// The error of a watch that etcd cancelled.
pub(super) fn cancellation(operation: &str, reason: &str) -> StoreError {
    let (operation, why) = (operation.to_owned(), reason.to_owned());
    match reason.contains("permission denied") {
        true => StoreError::Denied { operation, why },
        false => StoreError::Away { operation, why },
    }
}

/// Whether the user lacks a right: etcd asks for rights at each request, so that a new login would not help.
pub(super) fn is_without_right(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::PermissionDenied)
}

/// Whether the server does not know etcd's requests.
pub(super) fn is_no_etcd(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::Unimplemented)
}

/// Whether etcd no longer has the requested history.
pub(super) fn is_compacted(error: &Error) -> bool {
    has_message(error, "required revision has been compacted")
}

/// Whether etcd's history is shorter than the requested revision.
pub(super) fn is_future(error: &Error) -> bool {
    has_message(error, "required revision is a future revision")
}

/// Whether an answer was longer than this client accepts.
pub(super) fn is_too_long(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::OutOfRange)
        && !is_compacted(error)
        && !is_future(error)
}

/// Whether there is no such etcd lease.
pub(super) fn is_no_lease(error: &Error) -> bool {
    // The client makes the second of an answer with no time to live.
    matches!(error, Error::GRpcStatus(status) if status.code() == Code::NotFound)
        || matches!(error, Error::LeaseKeepAliveError(why) if why == "lease not found")
}

/// Whether etcd runs without users, so that no login is possible.
pub(super) fn is_without_users(error: &Error) -> bool {
    has_message(error, "authentication is not enabled")
}

fn has_message(error: &Error, text: &str) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.message().contains(text))
}

/// The error with its causes: the client's own text stops at "transport error".
fn describe(error: &Error) -> String {
    let (text, source) = if let Error::GRpcStatus(status) = error {
        (status.message().to_owned(), status.source())
    } else if let Error::TransportError(error) = error {
        (error.to_string(), error.source())
    } else {
        (error.to_string(), error.source())
    };
    with_causes(text, source)
}

/// An error's text, followed by those of its causes that say more.
pub(super) fn with_causes(mut text: String, mut source: Option<&(dyn StdError + 'static)>) -> String {
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = if text.is_empty() { cause_text } else { format!("{text}: {cause_text}") };
        }
        source = cause.source();
    }
    text
}
