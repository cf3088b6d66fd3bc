//! Verifies servers' certificates as webpki does, with one addition from Go: a certificate that `--etcd-cafile` itself names is
//! trusted as a server's own, even if it is a CA's.

use std::sync::{Arc, OnceLock};

use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        VerifierBuilderError, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

use super::{Refusal, Trust, certificate};

/// Verifies the server of one connection.
#[derive(Debug)]
pub(super) struct Verifier {
    webpki: Arc<WebPkiServerVerifier>,
    /// The certificates in `--etcd-cafile`.
    named: Vec<CertificateDer<'static>>,
    trust: Trust,
    refusal: OnceLock<Refusal>,
}

impl Verifier {
    pub(super) fn new(
        roots: RootCertStore,
        named: Vec<CertificateDer<'static>>,
        trust: Trust,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, VerifierBuilderError> {
        let webpki =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build()?;
        Ok(Self { webpki, named, trust, refusal: OnceLock::new() })
    }

    /// Why the server's certificate was refused.
    pub(super) fn refusal(&self) -> Option<&Refusal> {
        self.refusal.get()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = if self.named.contains(end_entity) {
            verify_named(end_entity, server_name, now)
        } else {
            self.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        };
        if let Err(error) = &verified {
            self.refusal.get_or_init(|| Refusal::of_certificate(error, end_entity, server_name, &self.trust));
        }
        verified
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// What webpki checks besides the chain, which a certificate that the operator named does not need. The handshake proves that
/// the server has its key.
fn verify_named(
    end_entity: &CertificateDer<'_>,
    server_name: &ServerName<'_>,
    now: UnixTime,
) -> Result<ServerCertVerified, Error> {
    let parsed = certificate::parse(end_entity).ok_or(CertificateError::BadEncoding)?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < parsed.validity().not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > parsed.validity().not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    if !certificate::is_for_servers(&parsed) {
        return Err(CertificateError::InvalidPurpose.into());
    }
    // Refuses unknown critical extensions, too.
    verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
    Ok(ServerCertVerified::assertion())
}
