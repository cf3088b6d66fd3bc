//! Why a TLS connection failed, and the remedy: rustls' errors and alerts in an operator's terms.

use std::io;

use tokio_rustls::rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage,
    pki_types::{CertificateDer, ServerName},
};
use x509_parser::prelude::ASN1Time;

use super::{CA_FILE, CERT_FILE, KEY_FILE, Trust, certificate, identity::Identity};

/// The reason why a connection cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::store::etcd) struct Refusal {
    pub(in crate::store::etcd) why: String,
    /// Whether another attempt may succeed without an operator's help.
    pub(in crate::store::etcd) heals: bool,
}

/// Alerts about a client's certificate.
const ABOUT_CERTIFICATE: [AlertDescription; 10] = [
    AlertDescription::CertificateRequired,
    AlertDescription::NoCertificate,
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
];

/// Alerts about parameters of the connection that both sides must share.
const ABOUT_PARAMETERS: [AlertDescription; 3] = [
    AlertDescription::HandshakeFailure,
    AlertDescription::ProtocolVersion,
    AlertDescription::InsufficientSecurity,
];

const NOTHING_SHARED: &str =
    "the server shares no TLS version, cipher or signature with this agent, which speaks TLS 1.2 and 1.3";

impl Refusal {
    pub(in crate::store::etcd) fn permanent(why: impl Into<String>) -> Self {
        Self { why: why.into(), heals: false }
    }

    pub(in crate::store::etcd) fn healing(why: impl Into<String>) -> Self {
        Self { why: why.into(), heals: true }
    }

    /// The reason why a server's certificate was not accepted.
    pub(super) fn of_certificate(
        error: &Error,
        presented: &CertificateDer<'_>,
        name: &ServerName<'_>,
        trust: &Trust,
    ) -> Self {
        let name = name.to_str();
        let Some(parsed) = certificate::parse(presented) else {
            return Self::permanent("the server's certificate cannot be read: give the server another one");
        };
        let subject = format!("the server's certificate ({})", certificate::entity(parsed.subject()));
        let Error::InvalidCertificate(error) = error else {
            return Self::permanent(format!("{subject} cannot be verified: {error}"));
        };
        let (from, until) = (parsed.validity().not_before, parsed.validity().not_after);
        if is_expired(error) {
            let what = if until < ASN1Time::now() {
                format!("{subject} expired on {}", certificate::time(until))
            } else {
                format!("a certificate that signed {subject} has expired")
            };
            return Self::permanent(format!("{what}: renew it, or correct this host's clock"));
        }
        if matches!(error, CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) {
            // The clock may be set soon after the boot.
            let from = certificate::time(from);
            return Self::healing(format!("{subject} is not valid before {from}: check this host's clock"));
        }
        if matches!(
            error,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
        ) {
            let names = certificate::names(&parsed);
            let what = if names.is_empty() {
                format!("{subject} has no subject alternative name, and the common name does not count")
            } else {
                format!("{subject} is for {names}, not for {name}")
            };
            return Self::permanent(format!(
                "{what}: name the server in --etcd-endpoints as its certificate does, or give it a certificate for {name}"
            ));
        }
        if matches!(error, CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. })
        {
            let why = "is not for servers: its extended key usage must include serverAuth";
            return Self::permanent(format!("{subject} {why}"));
        }
        if matches!(error, CertificateError::UnsupportedSignatureAlgorithmContext { .. }) {
            let why = "or one that signed it is signed with an algorithm that is not safe, such as SHA-1: sign it with SHA-256";
            return Self::permanent(format!("{subject} {why}"));
        }
        let is_self_signed = parsed.subject() == parsed.issuer();
        let issuer = certificate::entity(parsed.issuer());
        let why = match (error, trust) {
            (CertificateError::UnknownIssuer, Trust::File(_)) if is_self_signed => {
                format!("is self-signed and not in {trust}: add it there, or name the file that has it")
            }
            (CertificateError::UnknownIssuer, Trust::System) if is_self_signed => {
                format!("is self-signed: name its file with {CA_FILE}")
            }
            (CertificateError::UnknownIssuer, Trust::File(_)) => {
                format!(
                    "is signed by {issuer}, which is not in {trust}: name the file of the CA that signed it"
                )
            }
            (CertificateError::UnknownIssuer, Trust::System) => format!(
                "is signed by {issuer}, which is not among {trust}: name the file of the CA that signed it with {CA_FILE}"
            ),
            (
                CertificateError::BadSignature
                | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. },
                _,
            ) => format!(
                "names {issuer} as its issuer, but the CA of that name in {trust} did not sign it: the CA has another key now, \
                 name the file of the CA that signed it"
            ),
            _ if parsed.is_ca() => format!(
                "is that of a CA, and the server uses it as its own: name this certificate's file with {CA_FILE}, or give the \
                 server a certificate that the CA signed"
            ),
            _ => format!("cannot be verified with {trust}: {error}"),
        };
        Self::permanent(format!("{subject} {why}"))
    }

    /// The reason why a handshake failed for another reason than the server's certificate.
    pub(super) fn of_handshake(error: &io::Error, identity: Option<&Identity>) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>());
        let Some(cause) = cause else {
            // What etcd does without TLS.
            let is_closed =
                [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
            return Self::healing(if is_closed.contains(&error.kind()) {
                "the server closes the connection during the TLS handshake: if etcd runs without TLS there, write http:// \
                 in --etcd-endpoints"
                    .to_owned()
            } else {
                format!("the TLS handshake failed: {error}")
            });
        };
        if let Error::AlertReceived(alert) = cause {
            return Self::of_alert(*alert, identity);
        }
        if matches!(cause, Error::InvalidMessage(InvalidMessage::InvalidContentType)) {
            let why =
                "the server does not speak TLS: write http:// in --etcd-endpoints, or switch on TLS in etcd";
            return Self::permanent(why);
        }
        if let Error::PeerIncompatible(what) = cause {
            return Self::permanent(format!("{NOTHING_SHARED}: {what:?}"));
        }
        let why = format!("the TLS handshake failed: {cause}");
        Self { why, heals: !matches!(cause, Error::InvalidCertificate(_)) }
    }

    /// The reason that a server gave for ending a connection.
    pub(super) fn of_alert(alert: AlertDescription, identity: Option<&Identity>) -> Self {
        let code = u8::from(alert);
        let alert_text = format!("TLS alert {code}, {alert:?}");
        match identity {
            None if ABOUT_CERTIFICATE.contains(&alert) => Self::permanent(format!(
                "the server requires a client certificate ({alert_text}): give {CERT_FILE} and {KEY_FILE}"
            )),
            Some(identity) if ABOUT_CERTIFICATE.contains(&alert) => Self {
                why: format!(
                    "the server refuses the client certificate in {CERT_FILE} {} ({alert_text}): {}",
                    identity.file.display(),
                    remedy(identity)
                ),
                heals: ASN1Time::now() < identity.not_before,
            },
            _ if ABOUT_PARAMETERS.contains(&alert) => {
                let or = if identity.is_none() {
                    format!(", or requires a client certificate (give {CERT_FILE} and {KEY_FILE})")
                } else {
                    String::new()
                };
                Self::permanent(format!("{NOTHING_SHARED}{or} ({alert_text})"))
            }
            _ if alert == AlertDescription::UnrecognisedName => Self::permanent(format!(
                "the server does not know the host name in its URL ({alert_text}): write one of its names in --etcd-endpoints"
            )),
            _ if alert == AlertDescription::NoApplicationProtocol => Self::permanent(format!(
                "the server does not speak HTTP/2 ({alert_text}): name etcd's client URL in --etcd-endpoints"
            )),
            _ => Self::healing(format!("the server ends the TLS connection ({alert_text})")),
        }
    }
}

fn is_expired(error: &CertificateError) -> bool {
    matches!(error, CertificateError::Expired | CertificateError::ExpiredContext { .. })
}

fn remedy(identity: &Identity) -> String {
    let now = ASN1Time::now();
    if now > identity.not_after {
        format!("it expired on {}, renew it", certificate::time(identity.not_after))
    } else if now < identity.not_before {
        format!("it is not valid before {}", certificate::time(identity.not_before))
    } else {
        "it must be signed by a CA in etcd's --trusted-ca-file and be for clients".to_owned()
    }
}
