//! Checks the admin listener, and who may change something through it.

use std::net::SocketAddr;

use crate::access::{Proof, Token, Writer};
use crate::config::document::Path;
use crate::config::{Admin, file, value};

use super::Checker;

const ADDRESS: &str = "127.0.0.1:9901";

impl Checker<'_> {
    pub(super) fn admin_address(&mut self, admin: &file::Admin, at: &Path) -> Option<SocketAddr> {
        let address = admin.address.as_deref().unwrap_or(ADDRESS);
        self.parse(address, &at.key("address"), value::socket_address)
    }

    pub(super) fn admin(
        &mut self,
        admin: &file::Admin,
        address: Option<SocketAddr>,
        at: &Path,
    ) -> Option<Admin> {
        let tls_at = at.key("tls");
        let tls = match &admin.tls {
            Some(tls) => self.listener_tls(tls, &tls_at).map(Some),
            None => Some(None),
        };
        let authorities = admin.tls.as_ref().and_then(|tls| tls.client_ca.as_ref());
        if authorities.is_some_and(|authorities| authorities.subject_header.is_some()) {
            let message = "the admin listener passes no request on";
            self.error(&tls_at.key("clientCa").key("subjectHeader"), message, None);
        }
        let writers_at = at.key("writers");
        let names = admin.writers.iter().map(|writer| writer.name.as_str());
        self.names("writer", names, &writers_at);
        let writers = self.each(&admin.writers, &writers_at, |checker, writer, at| {
            checker.admin_writer(writer, authorities.is_some(), at)
        });
        let is_near = address.is_none_or(|address| address.ip().is_loopback());
        if admin.tls.is_none() && !is_near && !admin.writers.is_empty() {
            let message = "whoever is in between can read the tokens: there is no TLS";
            self.warn(&writers_at, message, None);
        }
        Some(Admin {
            address: address?,
            tls: tls?,
            writers: writers?.into(),
        })
    }

    fn admin_writer(
        &mut self,
        writer: &file::AdminWriter,
        has_authorities: bool,
        at: &Path,
    ) -> Option<Writer> {
        let name = self.name(&writer.name, at);
        let proof = match (&writer.token_file, &writer.certificate_subject) {
            (Some(file), None) => self.token(file, &at.key("tokenFile")).map(Proof::Token),
            (None, Some(subject)) => {
                let subject_at = at.key("certificateSubject");
                if !has_authorities {
                    let message = "nobody can show a certificate: `tls.clientCa` is missing";
                    self.error(&subject_at, message, None);
                }
                let subject = self.parse(subject, &subject_at, subject_of);
                subject.filter(|_| has_authorities).map(Proof::Subject)
            }
            _ if self.document.is_maimed(at) => None,
            _ => {
                let message = "a writer shows either a token (`tokenFile`) or a certificate (`certificateSubject`)";
                self.error(at, message, None);
                None
            }
        };
        Some(Writer {
            name: name?,
            proof: proof?,
        })
    }

    fn token(&mut self, file: &str, at: &Path) -> Option<Token> {
        let content = self.read(file, at)?;
        let token = content.trim_ascii();
        let reason = if token.len() < Token::LEAST {
            format!(
                "has fewer than {} characters, which can be guessed",
                Token::LEAST
            )
        } else if !token.iter().all(u8::is_ascii_graphic) {
            "holds something else than one token: a line without spaces".to_owned()
        } else {
            return Some(Token::of(token));
        };
        let hint = Some("write one with `openssl rand -hex 32`".to_owned());
        self.error(at, format!("`{file}` {reason}"), hint);
        None
    }

    /// The name of the file in which weights that are set outlive the process.
    pub(super) fn state_file(
        &mut self,
        file: Option<&str>,
        at: &Path,
    ) -> Option<Option<std::path::PathBuf>> {
        let home = self.around.home;
        self.optional(file, at, |file| match file {
            "" => Err("is not the name of a file".to_owned()),
            file => Ok(home.join(file)),
        })
    }
}

fn subject_of(text: &str) -> Result<String, String> {
    match text.contains('=') {
        true => Ok(text.to_owned()),
        false => Err("is not a subject such as `CN=flagger, O=ops`".to_owned()),
    }
}
